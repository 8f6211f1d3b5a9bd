"""What the operations are measured on: a device, and sizes of a model that runs on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ROWS = (1, 8, 32, 256, 4096)
"""Rows on any device: one request, decode batches, a step with prompts."""
GPU_ROWS = 16384
"""One more size on a GPU."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """A device and the sizes measured on it.

    Attributes:
        device: where.
        dtype: of hidden states and vocabulary logits; router logits are fp32.
        rows: sizes of the sweep.
        vocabulary: columns of vocabulary logits.
        most_bytes: of one input; larger sizes are left out and the report says so.
        experts: of a router; this and the rest is Qwen3-30B-A3B's.
        top_k: experts per token.
        hidden: size of a hidden state.
        heads: of keys and values.
        head_size: of keys and values.
    """

    device: torch.device
    dtype: torch.dtype
    rows: tuple[int, ...]
    vocabulary: int
    most_bytes: int
    experts: int = 128
    top_k: int = 8
    hidden: int = 2048
    heads: int = 4
    head_size: int = 128

    @classmethod
    def for_device(cls, kind: str) -> Shapes:
        """Sizes for a device type, `cpu` or `cuda`."""
        device = torch.device(kind)
        if device.type == "cpu":
            return cls(device, torch.float32, ROWS, 32_000, 2**26)
        return cls(device, torch.bfloat16, (*ROWS, GPU_ROWS), 128_256, 2**31)

    def sweep(self, width: int, most_rows: int | None) -> tuple[int, ...]:
        """Rows to measure where a row of the largest input has `width` columns of `dtype`."""
        most = self.most_bytes // (width * self.dtype.itemsize)
        return _up_to(_up_to(self.rows, most), most_rows)

    def left_out(self, width: int, most_rows: int | None) -> tuple[int, ...]:
        """Rows asked for that are not measured because an input would be too large."""
        measured = self.sweep(width, most_rows)
        return tuple(rows for rows in _up_to(self.rows, most_rows) if rows not in measured)

    @property
    def setting(self) -> str:
        """One line for a reader."""
        return (
            f"Sizes: {self.experts} experts of which a token has {self.top_k}, router logits in "
            f"fp32; all else in {str(self.dtype).removeprefix('torch.')}: hidden states of "
            f"{self.hidden}, {self.heads} heads of {self.head_size}, vocabulary of "
            f"{self.vocabulary}."
        )

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers on the device."""
        return torch.Generator(self.device).manual_seed(seed)


def _up_to(rows: Sequence[int], most: int | None) -> tuple[int, ...]:
    return tuple(count for count in rows if most is None or count <= most)
