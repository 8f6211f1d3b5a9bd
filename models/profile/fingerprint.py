"""What binds a profile to a model: a digest of its configuration and its weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})
"""Keys of a configuration that say where a model came from or how it is loaded."""
_SAMPLE = 4096
"""Bytes read of each tensor. Training changes all of a tensor, so its middle is enough, and a
server need not read a whole model to know it."""
_LONGEST_HEADER = 100_000_000
"""As the format allows."""


class FingerprintError(ValueError):
    """A model has no fingerprint; the message names the folder or file."""


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model's configuration and of the middle of each of its tensors.

    It does not depend on how the tensors are spread over files.

    Args:
        folder: with `config.json` and safetensors weights.

    Raises:
        FingerprintError: the folder lacks one of them, or a file cannot be read.
    """
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except OSError as error:
        raise FingerprintError(f"{folder / CONFIG_NAME}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FingerprintError(f"{folder / CONFIG_NAME}: {error}") from None
    if not isinstance(config, dict):
        raise FingerprintError(f"{folder / CONFIG_NAME}: not a JSON object")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FingerprintError(f"{folder}: no safetensors weights to know the model by")
    tensors = {name: digest for path in files for name, digest in _tensors(path)}
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    whole = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name in sorted(tensors):
        whole.update(f"{name}\0{tensors[name]}\0".encode())
    return whole.hexdigest()


def model_folder(model: str, revision: str | None = None) -> Path:
    """Where a model's files lie on this machine.

    Args:
        model: a folder, or a name in the hub's cache.
        revision: of a name.

    Raises:
        FingerprintError: it is neither.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        raise FingerprintError(f"{model}: neither a folder nor a model on this machine") from None


def _tensors(path: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of each tensor of a safetensors file."""
    try:
        with path.open("rb") as file:
            whole = os.fstat(file.fileno()).st_size
            size = int.from_bytes(file.read(8), "little")
            if 8 + size > whole or size > _LONGEST_HEADER:
                raise ValueError
            header: dict[str, Any] = json.loads(file.read(size))
            for name, tensor in header.items():
                if name == "__metadata__":
                    continue
                start, end = (8 + size + offset for offset in tensor["data_offsets"])
                if end > whole:
                    raise FingerprintError(f"{path}: tensor {name} is cut off")
                length = min(_SAMPLE, end - start)
                file.seek(start + (end - start - length) // 2)
                sample = file.read(max(length, 0))
                kind = f"{tensor['dtype']}{tensor['shape']}".encode()
                yield name, hashlib.sha256(kind + sample).hexdigest()
    except OSError as error:
        raise FingerprintError(f"{path}: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, FingerprintError):
            raise
        raise FingerprintError(f"{path}: not a safetensors file") from None
