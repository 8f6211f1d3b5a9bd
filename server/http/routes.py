"""Routes beside vLLM's own: `/v1/routing/*`, and two of vLLM's with our part added."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry

from sluice.models.routing.combining import combining_fields
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.presets import MODEL_SEPARATOR, measured_preset, preset_policy
from sluice.server.admission import Admission
from sluice.server.http.examples import example_prompts
from sluice.server.http.listing import capabilities_listing
from sluice.server.http.state import Edge
from sluice.server.telemetry.engines import Engines
from sluice.server.telemetry.exposition import Exposition
from sluice.server.telemetry.utilization import utilization


def build_router(registry: CollectorRegistry, engines: Engines) -> APIRouter:
    """Routes of one app.

    Args:
        registry: what `/metrics` shows.
        engines: what they counted.
    """
    router, exposition = APIRouter(), Exposition(registry)

    @router.get("/v1/routing/capabilities")
    async def capabilities(request: Request) -> dict[str, Any]:
        listing = capabilities_listing(_edge(request).admission.capabilities)
        return {**listing, "examples": example_prompts(request.app.state.args.model)}

    @router.get("/v1/routing/presets")
    def presets(request: Request) -> dict[str, Any]:
        admission = _edge(request).admission
        return {
            "object": "list",
            "data": [preset_listing(admission, name) for name in admission.presets],
        }

    @router.get("/v1/routing/utilization")
    def layers_and_experts() -> dict[str, Any]:
        return utilization(engines)

    @router.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """vLLM's list, and each available preset as a model whose parent is the base model."""
        listed = await request.app.state.openai_serving_models.show_available_models()
        wire: dict[str, Any] = listed.model_dump()
        admission = _edge(request).admission
        base = admission.capabilities.models[0]
        card = next(card for card in wire["data"] if card["id"] == base)
        wire["data"] += [
            {**card, "id": f"{base}{MODEL_SEPARATOR}{name}", "parent": base}
            for name in admission.presets
            if admission.preset_refusal(name) is None
        ]
        return wire

    @router.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        fresh = "no-cache" in request.headers.get("cache-control", "")
        return Response(await exposition.text(fresh=fresh), media_type=CONTENT_TYPE_LATEST)

    return router


def preset_listing(admission: Admission, name: str) -> dict[str, Any]:
    """A preset: its policy, whether it is available here, and what was measured of it."""
    capabilities, refusal = admission.capabilities, admission.preset_refusal(name)
    return {
        "id": name,
        "object": "routing.preset",
        "description": admission.presets[name].description,
        "model": f"{capabilities.models[0]}{MODEL_SEPARATOR}{name}",
        "policy": _policy(admission, name),
        "combines_with": combining_fields(name, admission.presets, capabilities),
        "available": refusal is None,
        "reason": refusal and refusal.message,
        "measured": measured_preset(capabilities, name),
    }


def _policy(admission: Admission, name: str) -> dict[str, Any] | None:
    """A preset's effective policy, or None where this engine cannot do it."""
    try:
        return preset_policy(name, admission.presets, admission.capabilities).to_dict()
    except RoutingError:
        return None


def _edge(request: Request) -> Edge:
    edge: Edge = request.app.state.sluice
    return edge
