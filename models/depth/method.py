"""What a depth method implements, and what it is told.

Two kinds of method decide while the model runs. An `ExitMethod` looks at one generated token after
one layer and says whether it leaves. A `PromptMethod` reads one number per prompt token and layer
and turns their pool into a mask for the rest of the request. Both are stateless and hold no
tensors of their own: the HTTP edge lists and checks them without loading torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from numpy.typing import NDArray

from sluice.models.policy.policy import AdaptiveRule, ExitRule

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def decayed(threshold: float, temperature: float | None, index: int, max_tokens: int) -> float:
    """`clip(0.9 threshold + 0.1 exp(-temperature index / max_tokens), 0, 1)`.

    Args:
        threshold: of the rule.
        temperature: CALM's tau, or None for a constant threshold.
        index: of the generated token, from 0.
        max_tokens: longest output the client allowed.
    """
    if temperature is None:
        return threshold
    loosened = 0.9 * threshold + 0.1 * math.exp(-temperature * index / max_tokens)
    return min(max(loosened, 0.0), 1.0)


Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that a method takes.

    Attributes:
        low: smallest value, inclusive.
        high: largest value, inclusive.
        default: used where the request names none; None if it must.
        integer: only whole numbers.
    """

    low: float
    high: float
    default: float | None = None
    integer: bool = False


@dataclass(frozen=True, slots=True)
class ExitPoint:
    """Live rows under one method after one layer; what the model computed has its dtype.

    Attributes:
        layer: 0-based.
        hidden: residual stream after the layer, (rows, hidden).
        previous: residual stream before the layer, (rows, hidden); None unless asked for.
        logits: LM head on `hidden` after the final norm, (rows, vocabulary); None unless asked for.
        threshold: what `ExitMethod.threshold` gave for each row, fp32, (rows,).
        state: what the method keeps from exit to exit of one token; first dimension (rows,).
        tensors: the method's part of the profile.
    """

    layer: int
    hidden: Tensor
    previous: Tensor | None
    logits: Tensor | None
    threshold: Tensor
    state: dict[str, Tensor]
    tensors: Tensors


class ExitMethod(ABC):
    """Decides per generated token whether it has gone deep enough."""

    name: ClassVar[str]
    source: ClassVar[str]
    parameters: ClassVar[Mapping[str, Parameter]]
    needs_logits: ClassVar[bool] = False
    needs_previous: ClassVar[bool] = False
    decays: ClassVar[bool] = False
    """Whether CALM's decay of the threshold means something here: higher must be stricter."""
    leaves_below: ClassVar[bool] = False
    """Whether tokens leave below the threshold and not above it: then lower is stricter."""
    profile_tensors: ClassVar[tuple[str, ...]] = ()
    """Names of the trained tensors the method needs, without the method's own prefix."""

    def threshold(self, rule: ExitRule, index: int, max_tokens: int) -> float:
        """The number that a token is held against.

        Args:
            rule: of the token's request.
            index: of the token among the generated ones, from 0.
            max_tokens: longest output the client allowed.
        """
        assert rule.threshold is not None
        return decayed(rule.threshold, rule.decay, index, max_tokens)

    @abstractmethod
    def leaves(self, at: ExitPoint) -> Tensor:
        """Which rows leave after this layer: bool, (rows,)."""


class PromptMethod(ABC):
    """Decides a request's mask from its prompt; the mask holds for all generated tokens."""

    name: ClassVar[str]
    source: ClassVar[str]
    parameters: ClassVar[Mapping[str, Parameter]]
    pool: ClassVar[Literal["mean", "last"]]
    """Over the prompt's tokens: their mean, or the last one's value."""
    profile_tensors: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def statistic(self, layer: int, before: Tensor, after: Tensor, tensors: Tensors) -> Tensor:
        """One number per token.

        Args:
            layer: 0-based.
            before: residual stream before the layer, (rows, hidden), the model's dtype.
            after: residual stream after it, (rows, hidden), the model's dtype.
            tensors: the method's part of the profile.

        Returns:
            fp32, (rows,).
        """

    @abstractmethod
    def skipped_blocks(self, pooled: NDArray[np.float64], rule: AdaptiveRule) -> NDArray[np.bool_]:
        """Blocks to leave out, (layers,), from pooled statistics, (layers,)."""


def row_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of `a` with the same row of `b`, (rows, hidden) each; fp32, (rows,)."""
    from sluice.kernels.ops.layer_stats import COSINE, layer_stats

    return layer_stats(a, a.new_empty(0), b)[:, COSINE]
