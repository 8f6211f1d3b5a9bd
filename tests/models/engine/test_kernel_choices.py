"""The engine gives the same answers whichever implementation of its operations it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engine import Engine, engine
from support.expert_policies import EVERYTHING, OEA, XSHARE, prompt_of
from support.tiny import LAYERS, make_model

from sluice.kernels import dispatch
from sluice.kernels.cpu import batch_budget as cpu_budget
from sluice.kernels.cpu import exit_decision as cpu_exit
from sluice.kernels.cpu import layer_stats as cpu_stats
from sluice.kernels.cpu import route_topk as cpu_routing
from sluice.kernels.cpu import router_scores as cpu_scores
from sluice.kernels.dispatch import AUTO, REFERENCE, TRITON, VARIABLE, KernelChoiceError
from sluice.models.policy.policy import ExitRule, RoutingPolicy, SkipSet
from sluice.models.telemetry.report import build_report

TOKENS = 4
DEPTH: dict[str, RoutingPolicy] = {
    "skip": RoutingPolicy(SkipSet.of(attention=(1,), mlp=(3,), blocks=(4,))),
    "confidence": RoutingPolicy(exit=ExitRule("confidence", (1, 3), threshold=0.0005)),
    "entropy": RoutingPolicy(exit=ExitRule("entropy", (1, 3), threshold=5.54)),
    "saturation": RoutingPolicy(exit=ExitRule("saturation", (1, 3), threshold=0.95)),
}
ASKED = {**EVERYTHING, **DEPTH, "oea": OEA, "xshare": XSHARE}


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def running(request: pytest.FixtureRequest, models_folder: Path) -> Iterator[Engine]:
    folder = make_model(request.param, models_folder / f"choices-{request.param}")
    with engine(folder, enable_prefix_caching=False, max_num_seqs=32) as made:
        yield made


def compiled() -> dict[str, int]:
    """Machine code there is, by function."""
    parts = (
        (cpu_routing, ("_route", "_count")),
        (cpu_scores, ("_scores",)),
        (cpu_budget, ("_share",)),
        (cpu_exit, ("_decide",)),
        (cpu_stats, ("_compare",)),
    )
    return {name: len(getattr(part, name).signatures) for part, names in parts for name in names}


def test_no_request_waits_for_a_compiler(running: Engine) -> None:
    before = compiled()
    assert all(before.values()), before
    prompts = [prompt_of(6, seed=index) for index in range(len(ASKED))]
    running.generate(prompts, list(ASKED.values()), TOKENS)
    assert compiled() == before


def test_tokens_and_reports_do_not_depend_on_the_choice(
    running: Engine, choosing: pytest.MonkeyPatch
) -> None:
    prompts = [prompt_of(6 + 3 * index, seed=index) for index in range(len(ASKED))]
    found = {}
    for choice in (AUTO, REFERENCE, TRITON):
        choosing.setenv(VARIABLE, choice)
        dispatch.chosen.cache_clear()
        tokens = running.generate(prompts, list(ASKED.values()), TOKENS, records=list(ASKED))
        taken = {name: running.take_record(name) for name in ASKED}
        # A request without a policy has no record.
        reports = {
            name: policy and build_report(policy, taken[name]) for name, policy in ASKED.items()
        }
        found[choice] = (dict(zip(ASKED, tokens, strict=True)), reports)
    assert found[REFERENCE] == found[AUTO]
    assert found[TRITON] == found[AUTO]
    _, reports = found[AUTO]
    left = {name: reports[name]["exit_layers"] for name in DEPTH if name != "skip"}
    assert {layer for layers in left.values() for layer in layers} >= {1, LAYERS - 1}, left


def test_an_unknown_choice_stops_the_start(
    models_folder: Path, choosing: pytest.MonkeyPatch
) -> None:
    choosing.setenv(VARIABLE, "fastest")
    folder = make_model("llama", models_folder / "choices-llama")
    with pytest.raises(KernelChoiceError, match="must be one of"), engine(folder):
        pass
