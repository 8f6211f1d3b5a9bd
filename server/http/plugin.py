"""`vllm.endpoint_plugins` entry point: hangs the HTTP edge into vLLM's OpenAI server."""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.middleware import Middleware

from sluice.models.profile.profile import PROFILE_ENV, Profile
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.presets import PresetsFileError, all_presets, check_presets
from sluice.models.telemetry.module_cost import ModuleCost
from sluice.models.telemetry.records import Records
from sluice.models.vllm_adapter.patches.api_telemetry import inbox_of
from sluice.models.vllm_adapter.patches.tracing import RequestSpans
from sluice.server.access.authentication import CallerMiddleware
from sluice.server.access.keys import Keys
from sluice.server.admission import CACHE_SECRET_ENV, Admission
from sluice.server.console.page import build_console_router
from sluice.server.http.body_limit import BodyLimitMiddleware
from sluice.server.http.middleware import RoutingMiddleware
from sluice.server.http.openapi import describe_routing
from sluice.server.http.overload import OverloadMiddleware
from sluice.server.http.routes import build_router
from sluice.server.http.startup import (
    announce,
    hide_uvicorn_information,
    ready_line,
    shortened_context,
)
from sluice.server.http.state import Edge
from sluice.server.telemetry.audit import show_audit_log
from sluice.server.telemetry.build_info import BuildInfoCollector
from sluice.server.telemetry.engines import Engines
from sluice.server.telemetry.expert_metrics import ExpertCollector
from sluice.server.telemetry.metrics import LayerCollector, RequestMetrics

logger = logging.getLogger(__name__)


class RoutingPlugin:
    """vLLM `EndpointPlugin`; named in `VLLM_PLUGINS` by `sluice serve`."""

    name = "sluice"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add routes and the innermost middleware; called before the engine is known.

        Raises:
            KeysFileError: the keys file cannot be used.
        """
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        registry = get_prometheus_registry()
        args: Namespace = app.state.args
        engines = app.state.sluice_engines = Engines()
        registry.register(BuildInfoCollector())
        registry.register(LayerCollector(engines))
        registry.register(ExpertCollector(engines, per_expert=args.expert_metrics))
        app.include_router(build_router(registry, engines))
        if args.console:
            app.include_router(build_console_router())
        keys = None if args.keys is None else Keys.load(args.keys)
        # `add_middleware` would put ours outside vLLM's authentication, which is added later.
        app.user_middleware += edge_middleware(args, keys)
        describe_routing(app)
        # Not in `sluice serve`: each API server process has logging of its own.
        show_audit_log()
        if args.quiet:
            hide_uvicorn_information()

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Read capabilities, profile and presets once the engine is there.

        Raises:
            PresetsFileError: a preset asks for something this model cannot do, or is in the
                profile too.
            ProfileError: the profile cannot be read, or was made for another model.
        """
        served = tuple(card.name for card in state.openai_serving_models.base_model_paths)
        profile_folder = os.environ.get(PROFILE_ENV)
        profile = Profile.load(Path(profile_folder)) if profile_folder else None
        presets = all_presets(args.presets, profile)
        # Every rank has the same model, so the first answer serves.
        expert_answer = (await engine_client.collective_rpc("describe_experts"))[0]
        cost = (await engine_client.collective_rpc("describe_cost"))[0]
        capabilities = Capabilities.of(
            engine_client.vllm_config, served, profile, expert_answer, args.expert_routing
        )
        if capabilities.speed_warning is not None:
            logger.warning("%s", capabilities.speed_warning)
        try:
            check_presets(presets, capabilities)
        except RoutingError as error:
            raise PresetsFileError(
                f"presets file {args.presets}: {error.param}: {error.message}"
            ) from None
        metrics, spans = RequestMetrics(presets, REGISTRY), RequestSpans.attach(engine_client)
        admission = Admission(capabilities, presets, os.environ[CACHE_SECRET_ENV])
        inbox, shape = inbox_of(engine_client.output_processor), capabilities.expert_shape
        indices = engine_client.engine_core.engine_ranks_managed
        state.sluice_engines.attach(inbox, indices, capabilities.layers, shape)
        records = Records(inbox, None if cost is None else ModuleCost.from_wire(cost), shape)
        state.sluice = Edge(admission, metrics, records, spans)
        if engine_client.vllm_config.parallel_config._api_process_rank == 0:
            context = shortened_context(engine_client.vllm_config.model_config)
            line = ready_line(args, served[0], len(presets), context)
            state.announcement = asyncio.create_task(announce(state, line))


def edge_middleware(args: Namespace, keys: Keys | None) -> list[Middleware]:
    """Our middleware, the outermost first: what costs least is asked before what costs more."""
    overload = {"limit": args.max_open_requests, "retry_after": args.retry_after}
    return [
        Middleware(OverloadMiddleware, **overload),
        Middleware(BodyLimitMiddleware, limit=args.max_body_bytes),
        Middleware(CallerMiddleware, keys=keys, open_metrics=args.open_metrics),
        Middleware(RoutingMiddleware),
    ]
