"""State of the HTTP edge, one per app: what the middleware and the routes share."""

from __future__ import annotations

from dataclasses import dataclass

from sluice.models.telemetry.records import Records
from sluice.models.vllm_adapter.patches.tracing import RequestSpans
from sluice.server.admission import Admission
from sluice.server.telemetry.metrics import RequestMetrics


@dataclass(frozen=True, slots=True)
class Edge:
    """Everything a request needs at the edge.

    Attributes:
        admission: accepts or refuses routing.
        metrics: counts requests.
        records: of what requests ran.
        spans: of routed requests, or None where vLLM traces nothing.
    """

    admission: Admission
    metrics: RequestMetrics
    records: Records
    spans: RequestSpans | None = None
