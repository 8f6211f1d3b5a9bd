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

EXTRA_ARGS_KEY = "sluice"
"""The one key of `SamplingParams.extra_args` that is ours."""

_DIGEST_CHARS = 16


class Phase(StrEnum):
    """Which tokens a depth control acts on. Decode tokens are the generated ones."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_CHARS]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class SkipSet:
    """Sub-layers that the tokens of one phase do not run.

    Attributes:
        attention: 0-based layers whose attention is skipped, ascending, unique.
        mlp: 0-based layers whose MLP (or mixture of experts) is skipped, ascending, unique.
        phase: the tokens that skip.
    """

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    phase: Phase = Phase.BOTH

    @classmethod
    def of(
        cls,
        *,
        blocks: tuple[int, ...] = (),
        attention: tuple[int, ...] = (),
        mlp: tuple[int, ...] = (),
        phase: Phase = Phase.BOTH,
    ) -> Self:
        """Normalise layer lists: blocks become both sub-layers, order and repeats are dropped."""
        return cls(
            attention=tuple(sorted({*blocks, *attention})),
            mlp=tuple(sorted({*blocks, *mlp})),
            phase=phase,
        )

    @property
    def empty(self) -> bool:
        """True when nothing is skipped: the request runs stock."""
        return not self.attention and not self.mlp


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """One request's routing.

    Attributes:
        skip: the depth control; an empty set is full depth.
        report: whether the answer carries a report of what ran. Never changes a token.
    """

    skip: SkipSet = SkipSet()
    report: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The effective policy in wire form (design section 7), blocks resolved."""
        wire: dict[str, Any] = {}
        if not self.skip.empty:
            wire["depth"] = {
                "skip": {"attention": list(self.skip.attention), "mlp": list(self.skip.mlp)},
                "phase": self.skip.phase.value,
            }
        return wire

    @classmethod
    def from_dict(cls, wire: dict[str, Any], *, report: bool = False) -> Self:
        """Inverse of `to_dict`; `report` is not part of the effective policy."""
        depth = wire.get("depth")
        if depth is None:
            return cls(report=report)
        return cls(
            skip=SkipSet.of(
                attention=tuple(depth["skip"]["attention"]),
                mlp=tuple(depth["skip"]["mlp"]),
                phase=Phase(depth["phase"]),
            ),
            report=report,
        )

    @property
    def digest(self) -> str:
        """16 hex characters naming the effective policy; equal policies have equal digests."""
        return _digest(_canonical(self.to_dict()))

    @property
    def prompt_kv_digest(self) -> str | None:
        """Digest of the part that changes K/V of prompt tokens; None if prompts stay stock."""
        if self.skip.empty or self.skip.phase is Phase.DECODE:
            return None
        return self.digest

    @property
    def generated_kv_digest(self) -> str | None:
        """Digest for blocks with generated tokens; None if a prompt token would leave the same K/V.

        With a phase split, a generated token and a prompt token at the same position leave
        different K/V, so generated blocks must never serve as somebody's prompt.
        """
        if self.skip.empty or self.skip.phase is Phase.BOTH:
            return None
        return self.digest


@dataclass(frozen=True, slots=True)
class PolicyTicket:
    """What crosses from the HTTP edge to the worker: a policy and the key of its record."""

    policy: RoutingPolicy
    record: str

    def encode(self) -> str:
        """Canonical JSON, the value of `extra_args[EXTRA_ARGS_KEY]`."""
        return _canonical({"policy": self.policy.to_dict(), "record": self.record})

    @classmethod
    def decode(cls, text: str) -> Self:
        """Inverse of `encode`."""
        wire = json.loads(text)
        return cls(policy=RoutingPolicy.from_dict(wire["policy"]), record=wire["record"])

    @classmethod
    def from_extra_args(cls, extra_args: dict[str, Any] | None) -> Self | None:
        """The ticket of a request, or None for a stock request."""
        text = (extra_args or {}).get(EXTRA_ARGS_KEY)
        return None if text is None else cls.decode(text)


def salted(digest: str | None, client_salt: str | None) -> str | None:
    """Prefix-cache salt of a request: its prompt K/V digest joined with the client's own salt."""
    if digest is None:
        return client_salt
    return f"sluice-{digest}-{_digest(client_salt)}" if client_salt else f"sluice-{digest}"
