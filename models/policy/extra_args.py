"""What crosses from the HTTP edge to the worker, inside vLLM's `SamplingParams.extra_args`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Self

from sluice.models.policy.policy import RoutingPolicy, canonical_json

EXTRA_ARGS_KEY = "sluice"
"""The one key of `SamplingParams.extra_args` that is ours."""


@dataclass(frozen=True, slots=True)
class RoutingExtraArgs:
    """A request's policy, and the key under which the worker keeps what it ran."""

    policy: RoutingPolicy
    request_key: str

    def encode(self) -> str:
        """Canonical JSON, the value of `extra_args[EXTRA_ARGS_KEY]`."""
        wire = {"policy": self.policy.to_dict(), "request_key": self.request_key}
        # The worker keeps more of a request that reports.
        return canonical_json({**wire, "report": True} if self.policy.report else wire)

    @classmethod
    def decode(cls, text: str) -> Self:
        """Inverse of `encode`."""
        wire = json.loads(text)
        policy = RoutingPolicy.from_dict(wire["policy"], report=wire.get("report", False))
        return cls(policy=policy, request_key=wire["request_key"])

    @classmethod
    def from_extra_args(cls, extra_args: dict[str, Any] | None) -> Self | None:
        """What a request carries, or None for a stock request."""
        text = (extra_args or {}).get(EXTRA_ARGS_KEY)
        return None if text is None else cls.decode(text)
