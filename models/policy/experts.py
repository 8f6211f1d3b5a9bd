"""What one request asks of the experts: immutable values, part of `RoutingPolicy`.

Layers and experts are 0-based; `(layer, expert)` is a routed expert, never a shared one. The order
in which a layer applies the controls is that of `sluice.kernels.ops.route_topk`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Self

ExpertId = tuple[int, int]
"""Layer and expert."""

# C3PO's own numbers, but for the bandwidth, which is not published.
REMIX_LAYERS = 5
REMIX_TOP = 20
REMIX_ALPHA = 0.5
REMIX_NEIGHBORS = 3
REMIX_BANDWIDTH = 0.5
REMIX_MAX_SIMILARITY = 0.95


class BudgetMethod(StrEnum):
    """How the decode rows of a step agree on a set of experts."""

    OEA = "oea"
    XSHARE = "xshare"
    LYNX = "lynx"


class RemixMethod(StrEnum):
    """Where the other router probabilities come from (C3PO)."""

    KERNEL = "kernel"
    MODE = "mode"
    SUPPLIED = "supplied"


class RemixScope(StrEnum):
    """Which tokens are re-mixed."""

    LAST = "last"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class ExpertBudget:
    """A set of experts that the opted-in decode rows of a step share.

    Attributes:
        method: how the set is chosen (`sluice.models.experts.router`).
        k0: leading choices of every row that make up the set (`oea`).
        experts: size of the set per layer (`xshare`, `lynx`).
    """

    method: BudgetMethod
    k0: int | None = None
    experts: int | None = None


@dataclass(frozen=True, slots=True)
class Remix:
    """Replace router probabilities p by `alpha * p + (1 - alpha) * reference`.

    Attributes:
        method: `kernel` averages the pathways of the nearest references by prompt embedding,
            `mode` those nearest by the row's own router probabilities, layer by layer, `supplied`
            takes `pathway`.
        scope: the last prompt token, or that and every generated token.
        alpha: share of the row's own probabilities, in [0, 1].
        layers: critical layers, ascending; mixture-of-experts layers only.
        top: experts per layer that take part, the row's most probable; they keep their total mass.
        references: name of the reference set in the profile, or None (`supplied`).
        neighbors: how many references are averaged, or None (`supplied`).
        kernel: `gaussian` or `cosine` weights of the neighbours, or None (`supplied`).
        bandwidth: of the Gaussian kernel, or None.
        max_similarity: more similar references are left out (the paper's leak guard), or None.
        embedding: of the prompt, from the client's own encoder, or None for the model's own.
        pathway: probabilities, one row per entry of `layers`, one number per expert (`supplied`).
    """

    method: RemixMethod
    scope: RemixScope
    alpha: float
    layers: tuple[int, ...]
    top: int
    references: str | None = None
    neighbors: int | None = None
    kernel: str | None = None
    bandwidth: float | None = None
    max_similarity: float | None = None
    embedding: tuple[float, ...] | None = None
    pathway: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class Contrast:
    """SCMoE: logits `(1 + beta) * strong - beta * weak` over the strong pass's plausible tokens.

    Attributes:
        weak_rank: rank, from 0, of the one expert that the weak pass runs in every layer.
        beta: weight of the weak pass, >= 0.
        alpha: tokens below this share of the strong pass's best probability are out, in (0, 1].
    """

    weak_rank: int
    beta: float
    alpha: float


@dataclass(frozen=True, slots=True)
class ExpertPolicy:
    """One request's expert controls; the default value asks for nothing.

    Attributes:
        masked: experts out of the selection; the next best take their slots. Ascending, unique.
        dropped: experts taken out of what was selected; their slots stay empty. Ascending, unique.
        forced: (layer, expert, weight or None) that are always selected; None is the mean weight
            of the row's other selected experts. Ascending by layer and expert.
        bias: (layer, expert, value) added to selection scores, weights untouched. Ascending.
        top_k: experts per token, for all layers or one number per decoder layer, or None.
        top_p: keep the shortest prefix of ranks whose share of the score exceeds this, or None.
        skip_ratio: drop ranks whose score is under this share of the first one's; for all layers
            or one number per decoder layer, or None.
        budget: the decode rows of a step share a set of experts, or None.
        remix: replaced router probabilities, or None.
        contrast: a weak pass beside the strong one, or None. Never with any other control.
        protect: the profile's super experts survive cuts and budgets.
    """

    masked: tuple[ExpertId, ...] = ()
    dropped: tuple[ExpertId, ...] = ()
    forced: tuple[tuple[int, int, float | None], ...] = ()
    bias: tuple[tuple[int, int, float], ...] = ()
    top_k: int | tuple[int, ...] | None = None
    top_p: float | None = None
    skip_ratio: float | tuple[float, ...] | None = None
    budget: ExpertBudget | None = None
    remix: Remix | None = None
    contrast: Contrast | None = None
    protect: bool = True

    @property
    def empty(self) -> bool:
        """True when nothing is asked: experts are chosen as vLLM chooses them."""
        return all(getattr(self, f.name) == f.default for f in fields(self) if f.name != "protect")

    @property
    def changes_prompt(self) -> bool:
        """Whether all prompt tokens may leave other K/V than stock ones."""
        named = (self.masked, self.dropped, self.forced, self.bias)
        cuts = (self.top_k, self.top_p, self.skip_ratio)
        return any(named) or any(cut is not None for cut in cuts)

    @property
    def changes_generated(self) -> bool:
        """Whether generated tokens may leave other K/V than prompt tokens would in their place."""
        return self.budget is not None or self.remix is not None

    def to_dict(self) -> dict[str, Any]:
        """What is set, as JSON values."""
        wire = {
            name: _listed(value)
            for name, value in asdict(self).items()
            if value not in (None, ()) and name != "protect"
        }
        if wire and not self.protect:
            wire["protect"] = False
        return wire

    @classmethod
    def from_dict(cls, wire: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        values: dict[str, Any] = {name: _tupled(value) for name, value in wire.items()}
        if "budget" in values:
            budget = values["budget"]
            values["budget"] = ExpertBudget(**{**budget, "method": BudgetMethod(budget["method"])})
        if "remix" in values:
            remix = {name: _tupled(value) for name, value in values["remix"].items()}
            remix["method"] = RemixMethod(remix["method"])
            remix["scope"] = RemixScope(remix["scope"])
            values["remix"] = Remix(**remix)
        if "contrast" in values:
            values["contrast"] = Contrast(**values["contrast"])
        return cls(**values)


STOCK_EXPERTS = ExpertPolicy()
"""Asks for nothing."""


def _listed(value: Any) -> Any:
    """Tuples as lists, enums as strings, None left out of nested values."""
    if isinstance(value, dict):
        return {name: _listed(part) for name, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_listed(part) for part in value]
    return value.value if isinstance(value, StrEnum) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(part) for part in value) if isinstance(value, list) else value
