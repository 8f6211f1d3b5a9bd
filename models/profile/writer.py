"""Writes profiles, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.models.profile.fields import ProfileFields

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 2
JSON_NAME = "profile.json"
HEADS_NAME = "heads.safetensors"
REFERENCES_NAME = "references.safetensors"


def digest_of(fields: Mapping[str, Any]) -> str:
    """SHA-256 of the JSON of a profile's fields without `digest`."""
    rest = {name: value for name, value in fields.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_profile(
    folder: Path,
    fields: Mapping[str, Any],
    heads: Mapping[str, Tensor],
    references: Mapping[str, Tensor],
) -> None:
    """Write a profile in place of the one that is there.

    All files are on the disk before the first one takes its name.

    Args:
        folder: made where it is missing.
        fields: of `ProfileFields`, without schema version, files and digest.
        heads: trained tensors, `<method>.<tensor>`, fp32.
        references: `<set>.embeddings` and `<set>.pathways`.

    Raises:
        OSError: a file cannot be written; the old profile is as it was.
        pydantic.ValidationError: `fields` are no profile's; nothing is written.
    """
    from safetensors.torch import save

    given = {HEADS_NAME: heads, REFERENCES_NAME: references}
    contents = {
        name: save({key: tensor.contiguous() for key, tensor in tensors.items()})
        for name, tensors in given.items()
        if tensors
    }
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    checked = ProfileFields.model_validate(
        {**fields, "schema_version": SCHEMA, "files": files, "digest": ""}
    )
    wire = checked.model_dump(mode="json", exclude_none=True)
    wire["digest"] = digest_of(wire)
    contents[JSON_NAME] = (json.dumps(wire, indent=1) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    _write_all({folder / name: content for name, content in contents.items()})
    for name in given.keys() - contents.keys():
        (folder / name).unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file at once: readers see the old one or the new one.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    _write_all({path: content})


def _write_all(contents: Mapping[Path, bytes]) -> None:
    """Write files beside the old ones, then give them their names."""
    partials = {path: path.with_name(f".{path.name}.partial") for path in contents}
    try:
        for path, content in contents.items():
            with partials[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, partial in partials.items():
            partial.replace(path)
    except BaseException:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
        raise
