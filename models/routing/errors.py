"""The error of routing that cannot be done, and its OpenAI shape.

Its `reason` is one of `REASONS`, a closed set, since it is a label of a metric. A server adds
errors of its own for callers who may not ask.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from sluice.models.routing.problems import shortened

Reason = Literal[
    "invalid_field",
    "layer_out_of_range",
    "expert_out_of_range",
    "too_few_experts",
    "protected_expert",
    "nothing_left_to_run",
    "unknown_preset",
    "needs_profile",
    "unsupported_model",
    "unsupported_endpoint",
    "unsupported_combination",
    "reserved_argument",
    "forbidden",
]


REASONS: tuple[Reason, ...] = get_args(Reason)

_MOST_MESSAGE = 1000
_MOST_PARAM = 300


class RoutingError(Exception):
    """A request's routing cannot be done exactly as asked.

    Attributes:
        message: what is wrong and what would be right.
        param: dotted path of the field in the request body.
        reason: label of `sluice_policy_rejections_total`.
        preset: that the request named, if there is one of that name; label of
            `sluice_requests_total`.
    """

    status = 400
    kind = "BadRequestError"

    def __init__(self, message: str, *, param: str, reason: Reason) -> None:
        super().__init__(message)
        # Both may hold words of the client's, of any length.
        self.message = shortened(message, _MOST_MESSAGE)
        self.param = shortened(param, _MOST_PARAM)
        self.reason = reason
        self.preset: str | None = None

    def body(self) -> dict[str, Any]:
        """OpenAI-shaped error object, as vLLM's own routes send it."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.status,
            }
        }
