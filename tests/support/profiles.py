"""Profiles for tests: heads that somebody drew, in the format that the server reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.reference import Reference
from torch import Tensor

from sluice.models.profile.fingerprint import fingerprint
from sluice.models.profile.writer import write_profile as write_fields


def write_profile(
    folder: Path, reference: Reference, heads: Mapping[str, Tensor], **fields: Any
) -> Path:
    """Write `heads` and `fields` as the profile of the reference's model."""
    config = reference.model.config
    shape = {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "fingerprint": fingerprint(Path(config.name_or_path)),
    }
    write_fields(folder, {"model": shape, **fields}, heads, {})
    return folder
