"""The engine of a calibration: the tokens of any other engine, its records, and nothing left."""

from __future__ import annotations

import gc
import os
import random
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.calibration import calibration_of, drawn_prompts
from support.edge import CAPABILITIES
from support.engine import engine
from support.tiny import LAYERS, make_model

from sluice.models.offline.calibrate.pipeline import engine_of
from sluice.models.offline.engine import OfflineEngine
from sluice.models.offline.evaluate.work import Work
from sluice.models.policy.experts import ExpertPolicy
from sluice.models.policy.policy import ExitRule, Phase, RoutingPolicy, SkipSet
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.schema import DepthFields, PresetFields, SkipFields

NEW_TOKENS = 10
PROMPTS = drawn_prompts(7, seed=3)
POLICIES = {
    "stock": RoutingPolicy(),
    "decode skip": RoutingPolicy(SkipSet.of(blocks=(2,), attention=(4,), phase=Phase.DECODE)),
    "skip": RoutingPolicy(SkipSet.of(blocks=(1, 3))),
    "exit": RoutingPolicy(exit=ExitRule("confidence", (2, 4), threshold=0.02)),
}
EXPERTS = RoutingPolicy(experts=ExpertPolicy(top_k=1))


def asked(
    running: OfflineEngine,
    policy: RoutingPolicy | None,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    ends: Sequence[int] = (),
    batch: int = 3,
) -> Sequence[tuple[int, ...]]:
    return running.answers(prompts, policy, [NEW_TOKENS] * len(prompts), ends, batch).tokens


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_tokens_are_those_of_any_engine(family: str, models_folder: Path, tmp_path: Path) -> None:
    model = make_model(family, models_folder / f"engine-{family}")
    policies = {**POLICIES, **({"experts": EXPERTS} if family == "qwen3_moe" else {})}
    with engine(model) as plain:
        expected = {
            name: [tuple(t) for t in plain.generate(PROMPTS, [policy] * len(PROMPTS), NEW_TOKENS)]
            for name, policy in policies.items()
        }
        records = ["a", "b"]
        skip = POLICIES["decode skip"]
        plain.run(PROMPTS[:2], [skip] * 2, NEW_TOKENS, records)
        work = Work.of_records([plain.take_record(name) for name in records])
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)
    calibration = calibration_of(model, PROMPTS, tmp_path)
    with engine_of(calibration, 40, 3) as running:
        for name, policy in policies.items():
            assert list(asked(running, policy)) == expected[name], name
        assert list(asked(running, None)) == expected["stock"]
        # An answer ends with its first end token, which belongs to it.
        end = expected["stock"][0][3]
        ended = asked(running, None, ends=[end])
        for tokens, whole in zip(ended, expected["stock"], strict=True):
            stop = whole.index(end) + 1 if end in whole else NEW_TOKENS
            assert tokens == whole[:stop]
        again = running.answers(PROMPTS[:2], skip, [NEW_TOKENS] * 2, (), 2)
        assert Work.of_records(again.records) == work
        assert (running.expert_answer["shape"] is None) == (family == "llama")
        assert running.resolve({}).stock
        for routing, param, message in (
            ({"depth": {"skip": {"blocks": [9]}}}, "routing.depth.skip.blocks.0", "layer 9"),
            ({"experts": {"top_k": 9}}, "routing.experts", "experts"),
        ):
            with pytest.raises(RoutingError) as caught:
                running.resolve(routing)
            assert caught.value.param.startswith(param)
            assert message in f"{caught.value.param}: {caught.value.message}"


def test_heads_of_exit_tests_are_counted(models_folder: Path, tmp_path: Path) -> None:
    """Of each generated token: those of the tests it was put to, and one more if it stayed."""
    model = make_model("llama", models_folder / "engine-heads")
    with engine_of(calibration_of(model, PROMPTS, tmp_path), 40, 3) as running:
        cost = running.model_runner.routed.cost
        layers, head = float(cost.modules.sum()), cost.head
        assert head > 0
        skip = running.answers(PROMPTS, POLICIES["decode skip"], [NEW_TOKENS] * 7, (), 3)
        left_out = float(cost.modules[2].sum() + cost.modules[4, 0])
        want = 1 - left_out / (layers + head)
        assert skip.records[0].generated_compute_fraction == pytest.approx(want)
        found = running.answers(PROMPTS, POLICIES["exit"], [NEW_TOKENS] * 7, (), 3)
        both = 0
        for record in found.records:
            ran, generated = 0.0, len(record.exit_layers)
            for last in record.exit_layers:
                ran += float(cost.modules[: last + 1].sum() + cost.fill[last + 1 :].sum())
                # After layer 2 one test, after layer 4 two; who stayed had two, and samples anew.
                ran += head * {2: 1, 4: 2, LAYERS - 1: 3}[last]
            want = ran / (generated * (layers + head))
            assert record.generated_compute_fraction == pytest.approx(want)
            both |= {*record.exit_layers} > {2}
        assert both


def test_latent_attention_in_fp32_starts_on_any_cpu(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a CPU has AMX, vLLM would choose a backend that takes bfloat16 only."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    model = make_model("deepseek_v2", models_folder / "engine-deepseek")
    with engine_of(calibration_of(model, PROMPTS, tmp_path), 40, 3) as running:
        assert running.vllm_config.model_config.dtype == torch.float32
        assert len(asked(running, RoutingPolicy(), PROMPTS[:1])[0]) == NEW_TOKENS


def test_a_preset_that_the_engine_cannot_run_is_named() -> None:
    """As the server names it; a field of the request itself is named by its own path."""
    stopped = OfflineEngine(None, None)
    vars(stopped)["capabilities"] = CAPABILITIES
    presets = {"deep": PresetFields(depth=DepthFields(skip=SkipFields(mlp=[9])))}
    for routing, param, message in (
        ({"preset": "deep"}, "routing.preset", "preset 'deep' is not available: layer 9"),
        ({"preset": "none such"}, "routing.preset", "'none such' does not exist"),
        ({"depth": {"skip": {"mlp": [9]}}}, "routing.depth.skip.mlp.0", "^layer 9 does not"),
    ):
        with pytest.raises(RoutingError, match=message) as caught:
            stopped.resolve(routing, presets)
        assert caught.value.param == param


def test_work_and_time(models_folder: Path, tmp_path: Path) -> None:
    model = make_model("llama", models_folder / "engine-llama")
    with engine_of(calibration_of(model, PROMPTS, tmp_path), 40, 4) as running:
        lengths = [2, 5, 1, 9, 4]
        full = running.answers(PROMPTS[:5], RoutingPolicy(), lengths, (), 2)
        assert [len(tokens) for tokens in full.tokens] == lengths
        work = Work.of_records(full.records)
        assert work.generated_tokens == sum(lengths) - 5
        assert (work.mean_layers, work.compute_fraction) == (LAYERS, 1.0)
        # All of a batch have their first token at once, and the steps after that are counted.
        assert full.decoded == sum(lengths) - 5
        assert full.seconds > 0
        none = running.answers(PROMPTS[:2], RoutingPolicy(), [1, 1], (), 2)
        assert (none.decoded, none.seconds) == (0, 0.0)
        unasked = running.answers(PROMPTS[:5], None, lengths, (), 2)
        assert (unasked.records, unasked.decoded, unasked.tokens) == (
            (),
            full.decoded,
            full.tokens,
        )
        half = RoutingPolicy(SkipSet.of(blocks=(0, 2, 4), phase=Phase.DECODE))
        work = Work.of_records(running.answers(PROMPTS, half, [NEW_TOKENS] * 7, (), 3).records)
        cost = running.model_runner.routed.cost
        layers, head = float(cost.modules.sum()), cost.head
        assert work.mean_layers == 3.0
        want = (layers / 2 + head) / (layers + head)
        assert work.generated_compute_fraction == pytest.approx(want)
        generated = NEW_TOKENS - 1
        rows = [len(prompt) + generated for prompt in PROMPTS]
        # A token is sampled from each generated row, and from the prompt's last one.
        full_cost = [n * layers + NEW_TOKENS * head for n in rows]
        fractions = [1 - generated * layers / 2 / each for each in full_cost]
        expected = sum(n * each for n, each in zip(rows, fractions, strict=True)) / sum(rows)
        assert work.compute_fraction == pytest.approx(expected)


def test_long_prompts_are_cut_and_still_timed(models_folder: Path, tmp_path: Path) -> None:
    """Not all prompts fit into a step: some requests decode while others read."""
    model = make_model("llama", models_folder / "engine-llama")
    prompts = drawn_prompts(40, seed=1, low=300, high=300)
    with engine_of(calibration_of(model, prompts, tmp_path), 310, 40) as running:
        assert running.vllm_config.scheduler_config.max_num_batched_tokens == 8192
        outcome = running.answers(prompts, RoutingPolicy(), [8] * 40, (), 40)
        alone = running.answers(prompts[-3:], RoutingPolicy(), [8] * 3, (), 1)
    assert outcome.tokens[-3:] == alone.tokens
    assert 0 < outcome.decoded < 40 * 7


@pytest.mark.parametrize("stopped", [False, True])
def test_the_process_is_left_as_it_was(models_folder: Path, tmp_path: Path, stopped: bool) -> None:
    model = make_model("llama", models_folder / "engine-llama")
    calibration = calibration_of(model, PROMPTS, tmp_path)
    weights = weakref.ref(calibration.model.causal_lm)
    environment, threads = dict(os.environ), torch.set_num_threads
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def use() -> weakref.ref[object]:
        with engine_of(calibration, 40, 3) as running:
            assert weights() is None, "two copies of the model at a time"
            asked(running, None, PROMPTS[:1])
            served = weakref.ref(running._llm.llm_engine.engine_core)
            if stopped:
                raise KeyboardInterrupt
        return served

    if stopped:
        with pytest.raises(KeyboardInterrupt):
            use()
    else:
        served = use()
        gc.collect()
        assert served() is None
    assert dict(os.environ) == environment
    assert torch.set_num_threads is threads
    left = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert left == states
    assert torch.is_grad_enabled()
    # Training and another engine go on as if nothing had been.
    layer = torch.nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None
    with engine_of(calibration, 40, 3) as running:
        assert len(asked(running, None, PROMPTS[:1])) == 1
