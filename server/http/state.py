"""State of the HTTP edge, one per app: what the middleware and the routes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sluice.models.vllm_adapter.patches.tracing import RequestSpans
from sluice.server.admission import Admission
from sluice.server.telemetry.metrics import RequestMetrics


@dataclass(frozen=True, slots=True)
class Edge:
    """Everything a request needs at the edge.

    Attributes:
        admission: decides about routing.
        metrics: counts requests.
        engine: vLLM's `EngineClient`.
        spans: of routed requests, or None where vLLM traces nothing.
    """

    admission: Admission
    metrics: RequestMetrics
    engine: Any
    spans: RequestSpans | None = None

    async def take_record(self, record: str) -> dict[str, Any] | None:
        """The worker's record of an ended request; every rank forgets it.

        Tensor-parallel ranks run the same plan, so the first answer serves.
        """
        answers = await self.engine.collective_rpc("take_routing_record", args=(record,))
        return next((answer for answer in answers if answer is not None), None)
