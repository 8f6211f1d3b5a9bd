"""State of the HTTP edge, one per app: what the middleware and the routes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sluice.models.telemetry.request_record import RoutingRecord
from sluice.models.vllm_adapter.patches.tracing import RequestSpans
from sluice.server.admission import Admission
from sluice.server.telemetry.metrics import RequestMetrics


@dataclass(frozen=True, slots=True)
class Edge:
    """Everything a request needs at the edge.

    Attributes:
        admission: accepts or refuses routing.
        metrics: counts requests.
        engine: vLLM's `EngineClient`.
        spans: of routed requests, or None where vLLM traces nothing.
    """

    admission: Admission
    metrics: RequestMetrics
    engine: Any
    spans: RequestSpans | None = None

    async def take_record(self, request_key: str) -> RoutingRecord | None:
        """The record of an ended request, or None if the engine has none.

        Every rank forgets its record. Tensor-parallel ranks run the same plan, so that the first
        record stands for all.
        """
        records = await self.engine.collective_rpc("take_routing_record", args=(request_key,))
        return next((RoutingRecord.from_wire(wire) for wire in records if wire is not None), None)
