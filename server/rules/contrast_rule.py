"""`routing.experts.contrast`: from its wire form to a `Contrast`."""

from __future__ import annotations

from sluice.models.expert_policy import Contrast
from sluice.server.errors import RoutingError
from sluice.server.rules import expert_controls as controls
from sluice.server.rules.checks import in_range, number
from sluice.server.rules.expert_limits import EXPERTS, ExpertLimits
from sluice.server.schema import ContrastFields

CONTRAST = f"{EXPERTS}.contrast"
_NAME = "contrast"


def contrast_rule(fields: ContrastFields, refusal: str | None, limits: ExpertLimits) -> Contrast:
    """Check a contrast against the model and the engine.

    Args:
        fields: what the client wrote.
        refusal: why the engine cannot run a second pass, or None.
        limits: of the request.

    Raises:
        RoutingError: the engine cannot, or a number out of range.
    """
    if refusal is not None:
        raise RoutingError(
            f"contrast is not available: {refusal}", param=CONTRAST, reason="unsupported_model"
        )
    rank = in_range(fields.weak_rank, controls.weak_rank(limits.shape), f"{CONTRAST}.weak_rank")
    return Contrast(
        weak_rank=rank,
        beta=number(fields.beta, controls.BETA, _NAME, f"{CONTRAST}.beta"),
        alpha=number(fields.alpha, controls.CONTRAST_ALPHA, _NAME, f"{CONTRAST}.alpha"),
    )
