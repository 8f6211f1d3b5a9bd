"""What the plugin hands from the engine and the command line to the edge."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from support.edge import MOE, SMALL
from support.full_profile import frontier, point

from sluice.models.policy.policy import RoutingPolicy
from sluice.models.profile.profile import PROFILE_ENV
from sluice.models.profile.writer import write_profile
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.presets import PresetsFileError, preset_policy
from sluice.models.telemetry.module_cost import ModuleCost
from sluice.server.access.capability import Caller, Capability, ForbiddenError
from sluice.server.admission import CACHE_SECRET_ENV
from sluice.server.http import plugin
from sluice.server.telemetry.engines import Engines

ADMIN = Caller(None, Capability.ADMIN)
CONFIG = SimpleNamespace(
    observability_config=SimpleNamespace(otlp_traces_endpoint=None),
    parallel_config=SimpleNamespace(_api_process_rank=1),
)
COST = ModuleCost(np.ones((2, 2)), np.ones(2), 3.0, 4.0)
FEW = {"model": "m", "routing": {"experts": {"top_k": 2}}}


class FakeEngine:
    """Two ranks that describe their model, behind two engines."""

    vllm_config = CONFIG
    engine_core = SimpleNamespace(engine_ranks_managed=[2, 3])

    def __init__(self) -> None:
        self.output_processor = SimpleNamespace()

    async def collective_rpc(self, name: str) -> list[dict[str, Any]]:
        if name == "describe_cost":
            return [COST.to_wire(), {}]
        assert name == "describe_experts"
        return [{"shape": "of the first rank", "refusal": None}, {}]


def started(
    monkeypatch: pytest.MonkeyPatch,
    *,
    flag: bool = True,
    presets: Path | None = None,
    folder: Path | None = None,
    registry: CollectorRegistry | None = None,
) -> Any:
    """State of an edge on a model with experts, with the profile in `folder`."""

    def of(config: Any, models: Any, profile: Any, answer: Any, expert_routing: bool) -> Any:
        assert (config, models) == (CONFIG, ("m",))
        assert (profile and profile.folder) == folder
        assert answer["shape"] == "of the first rank"
        return replace(MOE, expert_routing=expert_routing, profile=profile)

    monkeypatch.setenv(PROFILE_ENV, str(folder or ""))
    monkeypatch.setenv(CACHE_SECRET_ENV, "secret")
    monkeypatch.setattr(Capabilities, "of", of)
    monkeypatch.setattr(plugin, "REGISTRY", registry or CollectorRegistry())
    cards = [SimpleNamespace(name="m")]
    models = SimpleNamespace(base_model_paths=cards)
    state = SimpleNamespace(openai_serving_models=models, sluice_engines=Engines())
    args = Namespace(presets=presets, expert_routing=flag)
    asyncio.run(plugin.RoutingPlugin().init_state(FakeEngine(), state, args))
    assert state.sluice.records.cost.to_wire() == COST.to_wire()
    assert [*state.sluice_engines.read()] == [2, 3]
    assert state.sluice_engines.expert_layers == MOE.expert_shape.layers
    return state.sluice


def policy_of(edge: Any, preset: str) -> RoutingPolicy:
    return preset_policy(preset, edge.admission.presets, edge.admission.capabilities)


def test_the_flag_reaches_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/v1/completions"
    assert started(monkeypatch, flag=True).admission.admit(path, FEW, ADMIN) is not None
    with pytest.raises(ForbiddenError):
        started(monkeypatch, flag=False).admission.admit(path, FEW, ADMIN)


@pytest.mark.parametrize("flag", [True, False])
def test_presets_with_experts_are_resolved_whatever_the_flag(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: bool
) -> None:
    presets = tmp_path / "presets.yaml"
    presets.write_text("presets: {few: {experts: {top_k: 2}}}")
    edge = started(monkeypatch, flag=flag, presets=presets)
    assert policy_of(edge, "few").experts.top_k == 2
    presets.write_text("presets: {few: {experts: {top_k: 99}}}")
    with pytest.raises(PresetsFileError, match=r"presets\.few\.experts\.top_k"):
        started(monkeypatch, flag=flag, presets=presets)


def test_presets_of_the_profile_join_those_of_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    points = [point("few", experts={"top_k": 2}), point("odd", experts={"top_k": 99})]
    measured = frontier(points, {"fast": "few", "balanced": "odd"})
    write_profile(tmp_path, {"model": SMALL, "frontier": measured}, {}, {})
    presets = tmp_path / "presets.yaml"
    presets.write_text("presets: {mine: {experts: {top_k: 1}}}")
    registry = CollectorRegistry()
    edge = started(monkeypatch, presets=presets, folder=tmp_path, registry=registry)
    assert [*edge.admission.presets] == ["mine", "fast", "balanced"]
    assert policy_of(edge, "fast").experts.top_k == 2
    for name in ("mine", "fast", "balanced", "custom", "none"):
        labels = {"preset": name, "outcome": "ok"}
        assert registry.get_sample_value("sluice_requests_total", labels) == 0, name
    presets.write_text("presets: {fast: {experts: {top_k: 1}}}")
    with pytest.raises(PresetsFileError, match=f"'fast' is in presets file {presets} and in"):
        started(monkeypatch, presets=presets, folder=tmp_path)
