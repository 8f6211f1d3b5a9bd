"""Records of ended requests, made where their answers are served."""

from __future__ import annotations

from dataclasses import dataclass

from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.telemetry.inbox import Inbox
from sluice.models.telemetry.module_cost import ModuleCost
from sluice.models.telemetry.request_record import RoutingRecord


@dataclass(frozen=True, slots=True)
class Records:
    """Hands out each record once.

    Attributes:
        inbox: where engines tell what requests ran.
        cost: of the model's parts, or None where depth is not controlled.
        shape: of its routed experts, if it has any to control.
    """

    inbox: Inbox
    cost: ModuleCost | None
    shape: ExpertShape | None

    async def take(self, request_key: str) -> RoutingRecord | None:
        """The record of a request whose answer is there; None if it reached no step.

        A stop string ends an answer before the engine knows, and an abort too: then this waits for
        the engine's next message.
        """
        await self.inbox.wait(request_key)
        return self.take_now(request_key)

    def take_now(self, request_key: str) -> RoutingRecord | None:
        """The record made of what has arrived by now."""
        sums = self.inbox.take(request_key)
        if sums is None or self.cost is None:
            return None
        return sums.record(self.cost, self.shape)
