"""Which tests run in one process, and which run first, when processes share them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

LONGEST = (
    "models/engine/test_depth_methods.py",
    "server/http",
    "models/engine/test_expert_routing.py",
    "loadtest/test_demo_server.py",
    "models/engine",
    "examples",
    "server/console",
    "models/offline/calibrate/frontier",
    "server",
    "loadtest",
    "models/offline",
    "kernels",
)
"""Paths in tests/ with minutes to go: first, so that one does not run when all else has ended."""

SHARED = {
    "server": (
        "server/http/test_adaptive_depth.py",
        "server/http/test_apis.py",
        "server/http/test_bad_input.py",
        "server/http/test_demo_profile.py",
        "server/http/test_examples.py",
        "server/http/test_expert_methods.py",
        "server/http/test_hostile_bodies.py",
        "server/http/test_openai_client.py",
        "server/http/test_parallel.py",
        "server/telemetry/test_metrics.py",
        "server/telemetry/test_counter_truth.py",
        "server/telemetry/test_records.py",
        "server/observability/test_observability.py",
        "server/cli/test_demo.py",
        "server/cli/test_evaluate.py",
        "server/cli/test_evaluate_engine.py",
    ),
    "console": (
        "server/console/test_answers.py",
        "server/console/test_comparison.py",
        "server/console/test_controls.py",
        "server/console/test_maps.py",
        "server/console/test_snippets.py",
    ),
}
"""Files around one server of the session: in two processes it would be started twice."""

SLOW = (
    *SHARED["server"],
    *SHARED["console"],
    "distribution",
    "examples",
    "kernels/bench",
    "kernels/ops/test_route_topk.py",
    "kernels/triton",
    "loadtest/clients/test_guidellm.py",
    "loadtest/comparison/test_comparison.py",
    "loadtest/test_demo_server.py",
    "loadtest/test_mock_server.py",
    "models/engine/test_adapters.py",
    "models/engine/test_agreement.py",
    "models/engine/sublayers",
    "models/engine/test_compiled_depth.py",
    "models/engine/test_contrast.py",
    "models/engine/test_depth_methods.py",
    "models/engine/test_depth_properties.py",
    "models/engine/test_expert_",
    "models/engine/test_families.py",
    "models/engine/test_isolation.py",
    "models/engine/test_kernel_choices.py",
    "models/engine/test_row_builders.py",
    "models/engine/test_runner.py",
    "models/engine/test_stock",
    "models/engine/test_structured_output.py",
    "models/engine/test_v2.py",
    "models/engine/test_worker.py",
    "models/offline/calibrate/depth",
    "models/offline/calibrate/experts",
    "models/offline/calibrate/frontier",
    "models/offline/demo",
    "models/offline/real_model/test_quality.py",
    "models/offline/test_engine.py",
    "models/profile/test_profile.py",
    "models/vllm_adapter/test_kv_fill.py",
    "server/access/test_guarded_server.py",
    "server/cli/test_calibrate.py",
    "server/cli/test_lm_eval.py",
    "server/cli/test_serve.py",
    "server/cli/test_start_up.py",
    "server/console/test_use.py",
    "server/http/test_measured_server.py",
    "server/telemetry/test_metrics_engines.py",
    "server/telemetry/test_metrics_parallel.py",
    "server/telemetry/test_spans.py",
    "support",
)
"""What `make test-fast` leaves out: engines, servers, training, and Triton's interpreter."""

_SCOPES = {f"tests/{path}": scope for scope, paths in SHARED.items() for path in paths}


def rank(path: Path) -> int:
    """Where in the order a file below tests/ belongs."""
    name = path.as_posix()
    return next((i for i, start in enumerate(LONGEST) if name.startswith(start)), len(LONGEST))


def slow(path: Path) -> bool:
    """Whether a file below tests/ is not for the daily loop."""
    return path.as_posix().startswith(SLOW)


class Schedule(LoadScopeScheduling):
    """A file stays in one process, and with it the files that share its server."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return _SCOPES.get(file, file)
