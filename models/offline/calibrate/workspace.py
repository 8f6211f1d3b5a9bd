"""What a calibration has done so far, kept beside the profile until it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from sluice.models.profile.writer import write_whole

FOLDER = ".calibration"


@dataclass(frozen=True)
class Part:
    """What a step found.

    Attributes:
        fields: of `sluice.models.profile.fields.ProfileFields`, as JSON values.
        heads: trained tensors, `<method>.<tensor>`, fp32.
        references: `<set>.embeddings` and `<set>.pathways`.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    references: Mapping[str, Tensor] = field(default_factory=dict)

    def tensor_digests(self) -> dict[str, str]:
        """SHA-256 of each of its tensors by name."""
        tensors = {**self.heads, **self.references}
        contents = {name: save({"": tensor.contiguous()}) for name, tensor in tensors.items()}
        return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def key_of(*depends: Any) -> str:
    """Digest of what a result depends on, JSON values."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Workspace:
    """Results by name, each with the key of what it depends on.

    A result whose key is another is as if it were not there. Files are written at once, so a run
    that is stopped leaves whole ones.

    Attributes:
        folder: made where it is missing.
    """

    folder: Path

    @classmethod
    def beside(cls, profile: Path) -> Workspace:
        """The workspace of a profile's folder.

        Raises:
            OSError: it cannot be made.
        """
        folder = profile / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def part(self, name: str, key: str) -> Part | None:
        """A step's result, or None."""
        held = self._held(name)
        return self._part(name, held) if held and held["key"] == key else None

    def _part(self, name: str, held: Any) -> Part:
        fields = held["value"]
        path = self._tensors_of(name, held["key"])
        tensors = load(path.read_bytes()) if fields["tensors"] else {}
        heads = _without("heads/", tensors)
        return Part(fields["fields"], heads, _without("references/", tensors))

    def keep_part(self, name: str, key: str, part: Part) -> None:
        """Keep a step's result.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {f"heads/{own}": tensor for own, tensor in part.heads.items()}
        tensors |= {f"references/{own}": tensor for own, tensor in part.references.items()}
        if tensors:
            whole = save({own: tensor.cpu().contiguous() for own, tensor in tensors.items()})
            write_whole(self._tensors_of(name, key), whole)
        before = self._held(name)
        self.keep(name, key, {"fields": part.fields, "tensors": bool(tensors)})
        if before and before["key"] != key:
            self._tensors_of(name, before["key"]).unlink(missing_ok=True)

    def value(self, name: str, key: str) -> Any:
        """A JSON value, or None."""
        held = self._held(name)
        return held["value"] if held and held["key"] == key else None

    def latest(self, name: str) -> Any:
        """A JSON value whatever its key, or None."""
        held = self._held(name)
        return held and held["value"]

    def latest_part(self, name: str) -> Part | None:
        """A step's result whatever its key, or None."""
        held = self._held(name)
        return held and self._part(name, held)

    def _tensors_of(self, name: str, key: str) -> Path:
        """A file for each key: stopped between two files, a result is still the one before."""
        return self.folder / f"{name}-{key[:16]}.safetensors"

    def _held(self, name: str) -> Any:
        try:
            return json.loads((self.folder / f"{name}.json").read_bytes())
        except FileNotFoundError:
            return None

    def keep(self, name: str, key: str, value: Any) -> None:
        """Keep a JSON value.

        Raises:
            OSError: it cannot be written.
        """
        content = json.dumps({"key": key, "value": value}) + "\n"
        write_whole(self.folder / f"{name}.json", content.encode())


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
