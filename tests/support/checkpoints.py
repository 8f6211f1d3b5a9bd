"""Folders that look like a model: a configuration and tensors, no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "dtype": "float32"}
TENSORS = {name: torch.arange(24.0).view(4, 6) + shift for shift, name in enumerate("abcd")}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor] = TENSORS,
    config: Mapping[str, Any] = CONFIG,
    shards: int = 1,
) -> Path:
    """Write a configuration and tensors, dealt out to so many files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for shard in range(shards):
        part = dict([*tensors.items()][shard::shards])
        save_file(part, folder / f"model-{shard}.safetensors", {"format": "pt"})
    return folder
