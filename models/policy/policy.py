"""What one request asks of the model: an immutable value, built once at the HTTP edge.

`RoutingPolicy` travels as canonical JSON inside `SamplingParams.extra_args`. It knows nothing of
HTTP, torch or vLLM. Layer numbers are 0-based; a skipped block is a skipped attention plus a
skipped MLP, so the value has no `blocks`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
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
        adapter: name of the profile's adapter that was trained for this set and acts on its tokens
            (`sluice.models.depth.stream_adapter`), or empty.
    """

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    phase: Phase = Phase.BOTH
    elastic: bool = False
    adapter: str = ""

    @classmethod
    def of(
        cls,
        *,
        blocks: tuple[int, ...] = (),
        attention: tuple[int, ...] = (),
        mlp: tuple[int, ...] = (),
        phase: Phase = Phase.BOTH,
        elastic: bool = False,
        adapter: str = "",
    ) -> Self:
        """Normalise layer lists: blocks become both sub-layers, order and repeats are dropped."""
        return cls(
            attention=tuple(sorted({*blocks, *attention})),
            mlp=tuple(sorted({*blocks, *mlp})),
            phase=phase,
            elastic=elastic,
            adapter=adapter,
        )

    @property
    def empty(self) -> bool:
        """True when nothing is skipped: the request runs stock."""
        return not self.attention and not self.mlp


ParameterValue = bool | int | float | str | tuple[float, ...]


class _MethodParameters:
    """What a rule's method takes, read by name.

    Attributes:
        parameters: names and values that are given, ascending by name.
    """

    __slots__ = ()
    parameters: tuple[tuple[str, ParameterValue], ...]

    def get(self, name: str) -> ParameterValue | None:
        """A parameter, or None if the rule has none of this name."""
        return dict(self.parameters).get(name)

    def number(self, name: str) -> float:
        """A number that the rule must have.

        Raises:
            KeyError: it has not.
        """
        value = dict(self.parameters)[name]
        assert isinstance(value, int | float), name
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers, empty if the rule has none of this name."""
        values = dict(self.parameters).get(name, ())
        assert isinstance(values, tuple), name
        return values


@dataclass(frozen=True, slots=True, init=False)
class ExitRule(_MethodParameters):
    """When a generated token leaves the layer loop (`sluice.models.depth.method.ExitMethod`).

    Attributes:
        method: name of the exit method.
        layers: 0-based layers after which a token is tested and may leave, ascending, unique,
            without the last layer.
        decay: CALM's temperature of the threshold's decay over the output, or None.
        sparing: whether tokens are tested only while that pays (`sluice.models.depth.sparing`).
        kv: what becomes of the K/V that the token did not compute.
        parameters: names and values of what the method takes.
    """

    method: str
    layers: tuple[int, ...]
    decay: float | None
    sparing: bool
    kv: MissingKV
    parameters: tuple[tuple[str, ParameterValue], ...]

    def __init__(
        self,
        method: str,
        layers: tuple[int, ...],
        *,
        decay: float | None = None,
        sparing: bool = False,
        kv: MissingKV = MissingKV.PROPAGATE,
        **parameters: ParameterValue | None,
    ) -> None:
        """A rule; of the method's `parameters`, those that are None or False are not given."""
        fixed = {"method": method, "layers": layers, "decay": decay, "sparing": sparing, "kv": kv}
        for name, value in fixed.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "parameters", _given(parameters))

    def to_dict(self) -> dict[str, Any]:
        """What is set, as JSON values."""
        wire = {"method": self.method, "layers": list(self.layers), "kv": self.kv.value}
        decay = {} if self.decay is None else {"decay": self.decay}
        sparing = {"sparing": True} if self.sparing else {}
        return {**wire, **decay, **sparing, **_listed(self.parameters)}

    @classmethod
    def from_dict(cls, wire: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(**_tupled({**wire, "kv": MissingKV(wire["kv"])}))


@dataclass(frozen=True, slots=True, init=False)
class AdaptiveRule(_MethodParameters):
    """How the model itself chooses what a request runs (`sluice.models.depth.method`).

    Attributes:
        method: name of the adaptive method.
        parameters: names and values of what the method takes.
    """

    method: str
    parameters: tuple[tuple[str, ParameterValue], ...]

    def __init__(self, method: str, **parameters: ParameterValue | None) -> None:
        """A rule; of the method's `parameters`, those that are None or False are not given."""
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "parameters", _given(parameters))

    def to_dict(self) -> dict[str, Any]:
        """What is set, as JSON values."""
        return {"method": self.method, **_listed(self.parameters)}

    @classmethod
    def from_dict(cls, wire: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(**_tupled(wire))


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
        """The effective policy in the form of a request's `routing`, blocks resolved."""
        depth: dict[str, Any] = {}
        if not self.skip.empty:
            depth["skip"] = {"attention": list(self.skip.attention), "mlp": list(self.skip.mlp)}
            depth["phase"] = self.skip.phase.value
            if self.skip.elastic:
                depth["elastic"] = True
            if self.skip.adapter:
                depth["adapter"] = self.skip.adapter
        if self.exit is not None:
            depth["exit"] = self.exit.to_dict()
        if self.adaptive is not None:
            depth["adaptive"] = self.adaptive.to_dict()
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
                adapter=depth.get("adapter", ""),
            )
            if skip
            else SkipSet(),
            exit=ExitRule.from_dict(rule) if rule else None,
            adaptive=AdaptiveRule.from_dict(adaptive) if adaptive else None,
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


def _given(
    parameters: dict[str, ParameterValue | None],
) -> tuple[tuple[str, ParameterValue], ...]:
    given = sorted(parameters.items())
    return tuple((name, value) for name, value in given if value is not None and value is not False)


def _listed(parameters: tuple[tuple[str, ParameterValue], ...]) -> dict[str, Any]:
    return {n: list(value) if isinstance(value, tuple) else value for n, value in parameters}


def _tupled(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
