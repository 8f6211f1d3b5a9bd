"""Profiles for tests: heads that somebody drew, in the format that the server reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from reference import Reference
from safetensors.torch import save_file
from torch import Tensor

from sluice.models.profile import HEADS_NAME, JSON_NAME, SCHEMA


def write_profile(folder: Path, reference: Reference, heads: Mapping[str, Tensor]) -> Path:
    """Write `heads` as the profile of the reference's model."""
    config = reference.model.config
    shape = {"layers": config.num_hidden_layers, "hidden": config.hidden_size}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_NAME).write_text(json.dumps({"schema_version": SCHEMA, "model": shape}))
    save_file({name: tensor.contiguous() for name, tensor in heads.items()}, folder / HEADS_NAME)
    return folder
