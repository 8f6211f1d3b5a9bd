"""What a depth method implements, and what it is told.

A method is a class in a file of `sluice.models.depth.exits` or `sluice.models.depth.adaptive`, of
one of these kinds:

ExitMethod         exits/     tests a generated token after a layer: does it leave?
StaticExit         exits/     leaves out the same blocks for every token; nothing runs
PromptMethod       adaptive/  pools a number of each prompt token into a mask for the answer
TokenMethod        adaptive/  runs every layer, and says of each token which were void
PromptTokenMethod  adaptive/  chooses from the embeddings which layers each prompt token runs

The rest of the server knows a method by its class attributes and methods only
(`sluice.models.depth.registry` finds and checks them). Methods are stateless and hold no tensors:
the HTTP server lists and checks them without loading torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from numpy.typing import NDArray

from sluice.models.depth.parameters import Parameter
from sluice.models.policy.policy import AdaptiveRule, ExitRule

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Tensors = Mapping[str, "Tensor"]


class ParameterError(ValueError):
    """A parameter's value does not suit the method or the model.

    Attributes:
        name: of the parameter.
        message: what is wrong with it.
        leaves_nothing: no layer would be left to run.
    """

    def __init__(self, name: str, message: str, *, leaves_nothing: bool = False) -> None:
        super().__init__(message)
        self.name = name
        self.message = message
        self.leaves_nothing = leaves_nothing


class DepthMethod(ABC):
    """What all methods have.

    Attributes:
        name: as requests write it.
        description: a few plain words for lists: when a token leaves, or which layers run.
        source: the paper that the method is from.
        parameters: what it takes, by name; each name is a field of the request.
        profile_tensors: names of the trained tensors it needs, without the method's own prefix.
        offered: whether requests over HTTP may name it.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    source: ClassVar[str]
    parameters: ClassVar[Mapping[str, Parameter]]
    profile_tensors: ClassVar[tuple[str, ...]] = ()
    offered: ClassVar[bool] = True

    def default_shares(self, num_layers: int) -> tuple[float, ...]:
        """What a parameter of kind `LayerShares` is where the request has none, (layers,)."""
        raise NotImplementedError(f"{self.name} has no default shares for {num_layers} layers")


class StaticExit(DepthMethod):
    """Leaves out blocks that the request alone decides, for every token of its phase."""

    @abstractmethod
    def skipped_blocks(self, layer: int, num_layers: int) -> tuple[int, ...]:
        """Blocks, 0-based, that do not run where tokens leave after `layer`."""


@dataclass(frozen=True, slots=True)
class ExitPoint:
    """Rows under one method after one layer; what the model computed has its dtype.

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


class ExitMethod(DepthMethod):
    """Decides per generated token whether it has gone deep enough.

    Attributes:
        needs_logits: whether it reads the LM head's logits.
        needs_previous: whether it reads the residual stream from before the layer.
        decays: whether CALM's decay of the threshold means something: higher must be stricter.
        leaves_below: whether tokens leave below the threshold and not above it.
    """

    needs_logits: ClassVar[bool] = False
    needs_previous: ClassVar[bool] = False
    decays: ClassVar[bool] = False
    leaves_below: ClassVar[bool] = False

    def threshold(self, rule: ExitRule, index: int, max_tokens: int) -> float:
        """The number that a token is held against; a method without `threshold` has its own.

        Args:
            rule: of the token's request.
            index: of the token among the generated ones, from 0.
            max_tokens: longest output the client allowed.
        """
        return decayed(rule.number("threshold"), rule.decay, index, max_tokens)

    @abstractmethod
    def leaves(self, at: ExitPoint) -> Tensor:
        """Which rows leave after this layer: bool, (rows,)."""


@dataclass(frozen=True, slots=True)
class PromptEffects:
    """What a rule does to the prompt, and to whom its keys and values (K/V) are of use.

    Attributes:
        acts_on_prompt: prompt tokens get other logits than at full depth.
        changes_prompt_kv: prompt tokens leave other K/V than at full depth.
        private_prompt_kv: a prompt token's K/V depend on later prompt tokens.
        changes_generated_kv: a generated token leaves other K/V than a prompt token would.
        reads_whole_prompt: every prompt token must run; none may come from the prefix cache.
    """

    acts_on_prompt: bool
    changes_prompt_kv: bool
    private_prompt_kv: bool
    changes_generated_kv: bool
    reads_whole_prompt: bool


class AdaptiveMethod(DepthMethod):
    """The model itself chooses what a request runs."""

    def in_mode(self, rule: AdaptiveRule) -> AdaptiveMethod:  # noqa: ARG002
        """The method that does what the rule says; another one for some modes of a method."""
        return self

    def check(self, rule: AdaptiveRule, num_layers: int) -> None:
        """Check what hangs on several parameters or on the model.

        Raises:
            ParameterError: names the parameter.
        """

    @abstractmethod
    def effects(self, rule: AdaptiveRule) -> PromptEffects:
        """What the rule does to the prompt."""


class PromptMethod(AdaptiveMethod):
    """Decides a request's mask from its prompt; the mask holds for all generated tokens.

    Attributes:
        pool: over the prompt's tokens: their mean, or the last one's value.
    """

    pool: ClassVar[Literal["mean", "last"]]

    def masks_prompt(self, rule: AdaptiveRule) -> bool:  # noqa: ARG002
        """Whether the prompt runs under the mask too, each layer decided before it runs."""
        return False

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

    def effects(self, rule: AdaptiveRule) -> PromptEffects:
        """See `AdaptiveMethod.effects`."""
        masked = self.masks_prompt(rule)
        return PromptEffects(masked, masked, masked, True, self.pool == "mean")


class TokenMethod(AdaptiveMethod):
    """Finds out after each layer whether it was void for a token; saves nothing.

    Attributes:
        replaces: whether a void layer's output is undone, so that later layers go on from its
            input; otherwise the output of the last layer that was not void goes to the final norm.
    """

    replaces: ClassVar[bool]

    @abstractmethod
    def void(
        self,
        layer: int,
        before: Tensor,
        after: Tensor,
        rule: AdaptiveRule,
        state: dict[str, Tensor],
        tensors: Tensors,
    ) -> Tensor:
        """Whether the layer is void for each row: bool, (rows,).

        Args:
            layer: 0-based.
            before: residual stream before the layer, (rows, hidden), the model's dtype.
            after: residual stream after it, (rows, hidden), the model's dtype.
            rule: of the rows' request.
            state: what the method keeps from layer to layer; first dimension (rows,).
            tensors: the method's part of the profile.
        """

    def effects(self, rule: AdaptiveRule) -> PromptEffects:  # noqa: ARG002
        """See `AdaptiveMethod.effects`."""
        return PromptEffects(True, self.replaces, False, False, False)


class PromptTokenMethod(AdaptiveMethod):
    """Chooses before the prompt runs which layers each of its tokens runs."""

    @abstractmethod
    def kept_tokens(
        self, embeddings: Tensor, rule: AdaptiveRule, num_layers: int
    ) -> NDArray[np.bool_]:
        """Which tokens each layer runs, bool, (tokens, layers), from (tokens, hidden)."""

    def effects(self, rule: AdaptiveRule) -> PromptEffects:  # noqa: ARG002
        """See `AdaptiveMethod.effects`."""
        return PromptEffects(True, True, True, True, False)


def decayed(threshold: float, temperature: float | None, index: int, max_tokens: int) -> float:
    """`clip(0.9 threshold + 0.1 exp(-temperature index / max_tokens), 0, 1)` (CALM).

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


def row_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of `a` with the same row of `b`, (rows, hidden) each; fp32, (rows,)."""
    from sluice.kernels.ops.layer_stats import COSINE, layer_stats

    return layer_stats(a, a.new_empty(0), b)[:, COSINE]
