"""What a calibration borrows of the HTTP edge: policies of `routing` objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sluice.models.calibrate.examples import CalibrationError
from sluice.models.policy import RoutingPolicy
from sluice.models.profile import Profile
from sluice.server.capabilities import Capabilities
from sluice.server.errors import RoutingError
from sluice.server.rules.resolve import resolve
from sluice.server.schema import parse_routing

_SERVED = "calibrated"


def resolver(
    vllm_config: Any, profile: Profile, expert_answer: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], RoutingPolicy]:
    """What makes a policy of a `routing` object without a preset, as a server would.

    Args:
        vllm_config: of the engine that runs the policies.
        profile: of its model.
        expert_answer: a worker's `describe_experts`.

    Returns:
        It raises `CalibrationError` where a server would answer with an error, and names the field.

    Raises:
        ProfileError: the profile was made for another model.
        FingerprintError: the model's files cannot be read.
    """
    capabilities = Capabilities.of(
        vllm_config, (_SERVED,), profile, expert_answer, expert_routing=True
    )

    def policy(routing: Mapping[str, Any]) -> RoutingPolicy:
        try:
            return resolve(parse_routing(routing), capabilities)
        except RoutingError as error:
            raise CalibrationError(f"{error.param}: {error.message}") from None

    return policy
