"""Cases of the operations on logits over the vocabulary."""

from __future__ import annotations

import torch

from sluice.kernels.bench.agreement import Outputs, assert_same, within
from sluice.kernels.bench.cases.case import Case, Counterpart, nbytes
from sluice.kernels.bench.cases.shapes import Shapes
from sluice.kernels.ops.contrast_logits import contrast_logits
from sluice.kernels.ops.exit_decision import (
    CONFIDENCE,
    ENTROPY,
    FIRST,
    LOG_SUM,
    SECOND,
    SPREAD,
    exit_decision,
)

_ENTROPY_TOLERANCE = 1e-4
_SURE = 24.0
"""A logit that has next to all of the probability."""


def exit_test_cases(shapes: Shapes, rows: int) -> tuple[Case, ...]:
    """Both measures; every other row is sure of its token and leaves."""
    logits = _logits(shapes, rows)
    logits[::2, 0] = _SURE
    sure = torch.full((rows,), 0.5, device=shapes.device)
    calm = torch.full((rows,), 1.0, device=shapes.device)

    def confident() -> Outputs:
        best = logits.float().softmax(-1).topk(2, dim=-1).values
        return best, best[:, 0] - best[:, 1] >= sure

    def confident_alike(result: Outputs, expected: Outputs) -> None:
        stats, leaves = expected
        best = (stats[:, [FIRST, SECOND]] - stats[:, LOG_SUM : LOG_SUM + 1]).exp()
        assert_same("probabilities", result[0], best)
        assert_same("leaves", result[1], leaves)

    def spread() -> Outputs:
        shares = logits.float().log_softmax(-1)
        entropy = -(shares.exp() * shares).sum(-1)
        return entropy, entropy <= calm

    def spread_alike(result: Outputs, expected: Outputs) -> None:
        stats, leaves = expected
        assert_same("entropy", result[0], stats[:, SPREAD], _ENTROPY_TOLERANCE)
        assert_same("leaves", result[1], leaves)

    settings = (
        (
            "confidence",
            CONFIDENCE,
            sure,
            Counterpart("PyTorch", confident, confident_alike),
        ),
        ("entropy", ENTROPY, calm, Counterpart("PyTorch", spread, spread_alike)),
    )
    return tuple(
        Case(
            exit_decision,
            rows,
            (logits, threshold, measure),
            nbytes(logits, threshold) + 17 * rows,
            setting,
            agreement=within(_ENTROPY_TOLERANCE),
            counterparts=(counterpart,),
        )
        for setting, measure, threshold, counterpart in settings
    )


def contrast_logits_cases(shapes: Shapes, rows: int) -> tuple[Case, ...]:
    """A strong and a weak pass; a few tokens of each row are plausible."""
    strong = _logits(shapes, rows)
    weak = 0.5 * strong + 0.5 * _logits(shapes, rows, seed=1)
    beta = torch.full((rows,), 0.5, device=shapes.device)
    alpha = torch.full((rows,), 0.1, device=shapes.device)
    return (
        Case(
            contrast_logits,
            rows,
            (strong, weak, beta, alpha),
            nbytes(strong, weak, beta, alpha) + nbytes(strong),
            agreement=within(max(1e-5, 2 * torch.finfo(shapes.dtype).eps)),
        ),
    )


def _logits(shapes: Shapes, rows: int, seed: int = 0) -> torch.Tensor:
    generator = shapes.generator(2 * rows + seed)
    size = (rows, shapes.vocabulary)
    drawn = torch.empty(size, dtype=shapes.dtype, device=shapes.device)
    return drawn.normal_(0.0, 2.0, generator=generator)
