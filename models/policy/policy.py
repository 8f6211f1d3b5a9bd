"""What one request asks of the model: an immutable value, built once at the HTTP edge.

`RoutingPolicy` travels as canonical JSON inside `SamplingParams.extra_args`. It knows nothing of
HTTP, torch or vLLM. Layer numbers are 0-based; a skipped block is a skipped attention plus a
skipped MLP, so the value has no `blocks`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from sluice.models.policy.experts import STOCK_EXPERTS, ExpertPolicy

_DIGEST_CHARS = 16


class Phase(StrEnum):
    """Which tokens a depth control acts on. Decode tokens are the generated ones."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


class MissingKV(StrEnum):
    """What becomes of K/V in layers that a live token did not run.

    `propagate` writes them at once from the hidden state that left (CALM); `recompute` runs the
    pending tokens through the missing layers when a later token goes there (EE-LLM).
    """

    PROPAGATE = "propagate"
    RECOMPUTE = "recompute"


def short_digest(text: str) -> str:
    """The first characters of a text's SHA-256, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARS]


def canonical_json(value: Any) -> str:
    """JSON that is equal for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class SkipSet:
    """Sub-layers that the tokens of one phase do not run.

    Attributes:
        attention: 0-based layers whose attention is skipped, ascending, unique.
        mlp: 0-based layers whose MLP (or mixture of experts) is skipped, ascending, unique.
        phase: the tokens that skip.
        elastic: the client left the choice to the server (`effort`): generated tokens may run
            deeper than this set, so that the rows of a step agree. Such sets are nested.
    """

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    phase: Phase = Phase.BOTH
    elastic: bool = False

    @classmethod
    def of(
        cls,
        *,
        blocks: tuple[int, ...] = (),
        attention: tuple[int, ...] = (),
        mlp: tuple[int, ...] = (),
        phase: Phase = Phase.BOTH,
        elastic: bool = False,
    ) -> Self:
        """Normalise layer lists: blocks become both sub-layers, order and repeats are dropped."""
        return cls(
            attention=tuple(sorted({*blocks, *attention})),
            mlp=tuple(sorted({*blocks, *mlp})),
            phase=phase,
            elastic=elastic,
        )

    @property
    def empty(self) -> bool:
        """True when nothing is skipped: the request runs stock."""
        return not self.attention and not self.mlp


@dataclass(frozen=True, slots=True)
class ExitRule:
    """When a generated token leaves the layer loop (`sluice.models.depth.method`).

    Attributes:
        method: name of the exit method.
        layers: 0-based layers after which a token is tested and may leave, ascending, unique,
            without the last layer.
        threshold: the method's threshold, or None if it has none.
        patience: agreeing exits in a row (`patience` only).
        decay: CALM's temperature of the threshold's decay over the output, or None.
        script: exit layer of each generated token (`replay` only, which HTTP does not offer).
        kv: what becomes of the K/V that the token did not compute.
    """

    method: str
    layers: tuple[int, ...]
    threshold: float | None = None
    patience: int | None = None
    decay: float | None = None
    script: tuple[int, ...] | None = None
    kv: MissingKV = MissingKV.PROPAGATE


@dataclass(frozen=True, slots=True)
class AdaptiveRule:
    """How the model itself chooses what a request runs (`sluice.models.depth`).

    Attributes:
        method: name of the method.
        mode: `readout`, `replace` or `predict` (`lac` only).
        threshold: the method's threshold, or None.
        budget: share of blocks to keep, or None (`similarity` only).
        retention: share of prompt tokens that each layer runs, one number a layer, or None for
            the cosine schedule (`mod` only).
        masked_prefill: the prompt runs under the mask too (`first` only).
    """

    method: str
    mode: str | None = None
    threshold: float | None = None
    budget: float | None = None
    retention: tuple[float, ...] | None = None
    masked_prefill: bool = False


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """One request's routing.

    Attributes:
        skip: sub-layers left out; an empty set is full depth.
        exit: per-token early exit of generated tokens, or None.
        adaptive: a mask that the model decides, or None. Never together with `skip` or `exit`.
        experts: which experts serve the tokens; an empty policy is vLLM's own choice.
        report: whether the answer carries a report of what ran. Never changes a token.
    """

    skip: SkipSet = SkipSet()
    exit: ExitRule | None = None
    adaptive: AdaptiveRule | None = None
    experts: ExpertPolicy = STOCK_EXPERTS
    report: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The effective policy in wire form (design section 7), blocks resolved."""
        depth: dict[str, Any] = {}
        if not self.skip.empty:
            depth["skip"] = {"attention": list(self.skip.attention), "mlp": list(self.skip.mlp)}
            depth["phase"] = self.skip.phase.value
            if self.skip.elastic:
                depth["elastic"] = True
        if self.exit is not None:
            depth["exit"] = _fields(self.exit)
        if self.adaptive is not None:
            depth["adaptive"] = _fields(self.adaptive)
        wire: dict[str, Any] = {"depth": depth} if depth else {}
        if not self.experts.empty:
            wire["experts"] = self.experts.to_dict()
        return wire

    @classmethod
    def from_dict(cls, wire: dict[str, Any], *, report: bool = False) -> Self:
        """Inverse of `to_dict`; `report` is not part of the effective policy."""
        depth = wire.get("depth", {})
        skip, rule, adaptive = depth.get("skip"), depth.get("exit"), depth.get("adaptive")
        return cls(
            skip=SkipSet.of(
                attention=tuple(skip["attention"]),
                mlp=tuple(skip["mlp"]),
                phase=Phase(depth["phase"]),
                elastic=depth.get("elastic", False),
            )
            if skip
            else SkipSet(),
            exit=ExitRule(**_tuples({**rule, "kv": MissingKV(rule["kv"])})) if rule else None,
            adaptive=AdaptiveRule(**_tuples(adaptive)) if adaptive else None,
            experts=ExpertPolicy.from_dict(wire.get("experts", {})),
            report=report,
        )

    @property
    def stock(self) -> bool:
        """True when nothing is asked: the request runs as vLLM runs it."""
        shallow = self.skip.empty and self.exit is None and self.adaptive is None
        return shallow and self.experts.empty

    @property
    def digest(self) -> str:
        """16 hex characters naming the effective policy; equal policies have equal digests."""
        return short_digest(canonical_json(self.to_dict()))

    @property
    def prompt_kv_digest(self) -> str | None:
        """Digest of the part that changes K/V of prompt tokens; None if prompts stay stock."""
        skips = not self.skip.empty and self.skip.phase is not Phase.DECODE
        replaces = self.adaptive is not None and self.adaptive.mode == "replace"
        changed = skips or replaces or self.private_prompt or self.experts.changes_prompt
        return self.digest if changed else None

    @property
    def private_prompt(self) -> bool:
        """A prompt token's K/V depend on later prompt tokens: no other request may share them."""
        rule = self.adaptive
        return rule is not None and (rule.method == "mod" or rule.masked_prefill)

    @property
    def private_generated(self) -> bool:
        """A generated token leaves other K/V than a prompt token would at its position.

        With a phase split, exits or decided masks, blocks with generated tokens must never serve
        as somebody's prompt. Exits that recompute leave full depth's K/V by the time a block is
        published.
        """
        splits = not self.skip.empty and (self.skip.phase is not Phase.BOTH or self.skip.elastic)
        exits = self.exit is not None and self.exit.kv is MissingKV.PROPAGATE
        rule = self.adaptive
        adapts = rule is not None and rule.mode not in ("readout", "replace")
        return splits or exits or adapts or self.experts.changes_generated

    @property
    def private_last_prompt(self) -> bool:
        """The last prompt token leaves other K/V than it would as an earlier one of a prompt."""
        return self.experts.remix is not None

    @property
    def reads_whole_prompt(self) -> bool:
        """Every prompt token must run, so none may come from the prefix cache.

        A pooled mask needs their hidden states, and a contrast's weak pass has K/V of its own.
        """
        pools = self.adaptive is not None and self.adaptive.method in ("first", "similarity")
        return pools or self.experts.contrast is not None


def _fields(rule: ExitRule | AdaptiveRule) -> dict[str, Any]:
    """What is set, as JSON values."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(rule).items()
        if value is not None and value is not False
    }


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
