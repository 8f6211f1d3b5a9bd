"""Share of a layer's weights that are much larger than the others: ZD of arXiv 2406.17415.

Fewer of them make a layer more important, the authors find; no text is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

LIMIT = 1.0
"""z-score above which a weight counts."""


def outlier_share(block: nn.Module) -> float:
    """Share of a block's weights whose z-score, over all of its weights, is above `LIMIT`.

    Weights are those of its linear maps, routed experts and router included; norms, biases and
    other vectors are left out. The z-score is signed, with the deviation of the whole population.
    Sums are taken in fp64; one matrix at a time is converted.
    """
    count = sum(matrix.numel() for matrix in _matrices(block))
    mean = _total(matrix.double().sum() for matrix in _matrices(block)) / count
    spread = _total((matrix.double() - mean).square().sum() for matrix in _matrices(block))
    limit = mean + LIMIT * (spread / count) ** 0.5
    return _total((matrix.double() > limit).sum() for matrix in _matrices(block)) / count


def _matrices(block: nn.Module) -> Iterator[Tensor]:
    for name, parameter in block.named_parameters():
        # Biases of all experts of a layer are a matrix in gpt-oss.
        if parameter.dim() > 1 and not name.endswith("bias"):
            yield from parameter.detach().flatten(0, -3) if parameter.dim() > 2 else [parameter]


def _total(parts: Iterator[Tensor]) -> float:
    return float(torch.stack([part.double() for part in parts]).sum())
