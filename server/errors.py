"""Errors a client can cause, and their OpenAI shape.

RoutingError                 400, with the dotted name of the offending field
└── the `reason` of each is one of `REASONS`, a closed set for the metric's label
"""

from __future__ import annotations

from typing import Any, Literal, get_args

Reason = Literal[
    "invalid_field",
    "layer_out_of_range",
    "nothing_left_to_run",
    "unknown_preset",
    "needs_profile",
    "unsupported_model",
    "unsupported_endpoint",
    "unsupported_combination",
    "reserved_argument",
]
REASONS: tuple[Reason, ...] = get_args(Reason)


class RoutingError(Exception):
    """A request's routing cannot be done exactly as asked.

    Attributes:
        message: what is wrong and what would be right.
        param: dotted path of the field in the request body.
        reason: label of `sluice_policy_rejections_total`.
    """

    status = 400

    def __init__(self, message: str, *, param: str, reason: Reason) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.reason = reason

    def body(self) -> dict[str, Any]:
        """OpenAI-shaped error object, as vLLM's own routes send it."""
        return {
            "error": {
                "message": self.message,
                "type": "BadRequestError",
                "param": self.param,
                "code": self.status,
            }
        }
