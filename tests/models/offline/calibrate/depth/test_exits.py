"""Exit thresholds: teacher-forced passes against decoding, and the choice against brute force."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration import calibration_of, drawn_prompts
from support.reference import Reference
from support.references.choices import random_heads, threshold_between
from support.tiny import FAMILIES, LAYERS, make_model
from torch import Tensor

from sluice.models.depth.registry import token_exits
from sluice.models.offline.calibrate.depth import training_data as head_rows
from sluice.models.offline.calibrate.depth.exit_candidates import exit_candidates
from sluice.models.offline.calibrate.depth.exit_grid import threshold_grid, turning_points
from sluice.models.offline.calibrate.depth.exit_simulation import ExitSetting, full_tokens, left
from sluice.models.offline.calibrate.depth.exits import METHODS, Exits
from sluice.models.offline.calibrate.depth.layer_saturation import (
    NEVER,
    SimilarTokens,
    saturation_thresholds,
)
from sluice.models.offline.calibrate.depth.risk_bound import RiskBound, hoeffding_bentkus
from sluice.models.offline.calibrate.depth.training_data import TokenStates, TrainSplit, likeliest
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.samples import Sample, SampleBatch
from sluice.models.policy.policy import ExitRule, RoutingPolicy
from sluice.models.profile.layer_fields import ExitThreshold

EXITS = (1, 3, 4)
NEW_TOKENS = 6
LOOSE = Exits(tolerance=0.8, error=0.2, thresholds=6)
"""Tiny random models agree with themselves at few exits."""


def calibration(folder: Path, family: str = "llama", prompts: int = 12) -> Calibration:
    """With drawn heads, as if the step `heads` had run."""
    make_model(family, folder / "model")
    of = calibration_of(
        folder / "model", drawn_prompts(prompts), folder / "work", new_tokens=NEW_TOKENS
    )
    reference = Reference(of.model.folder)
    states = reference.states(of.samples[0].prompt + of.samples[0].answer)
    of.parts["heads"] = Part(heads=random_heads(states))
    return of


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return calibration(tmp_path_factory.mktemp("llama"), prompts=24)


def tensors_of(of: Calibration, method: str) -> dict[str, Tensor]:
    heads = of.parts["heads"].heads
    return {name: heads[f"{method}.{name}"] for name in token_exits()[method].profile_tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_leaves_where_decoding_does(tmp_path: Path, family: str) -> None:
    """Each answer is that of decoding with exits, so both see the same tokens and K/V."""
    of = calibration(tmp_path, family, prompts=3)
    reference, heads = Reference(of.model.folder), dict(of.parts["heads"].heads)
    for method in METHODS:
        prompts = [sample.prompt for sample in of.samples]
        scores = [
            score
            for prompt in prompts
            for score in reference.scores(prompt, method, EXITS, NEW_TOKENS, heads)
        ]
        threshold = threshold_between(scores, 0.5)
        rule = ExitRule(method, EXITS, threshold=threshold)
        runs = [
            reference.run(prompt, RoutingPolicy(exit=rule), NEW_TOKENS, heads) for prompt in prompts
        ]
        assert min(run.margin for run in runs) > 1e-5
        samples = [
            Sample(prompt, tuple(run.tokens)) for prompt, run in zip(prompts, runs, strict=True)
        ]
        setting = ExitSetting(token_exits()[method], tensors_of(of, method), threshold, EXITS)
        found = left(of.model, SampleBatch.of(samples), setting)
        assert found.tokens.tolist() == [token for run in runs for token in run.tokens[1:]]
        layers = [LAYERS if at is None else at + 1 for run in runs for at in run.left]
        assert found.layers.tolist() == layers
        assert len(set(layers)) > 1, method


def test_a_large_vocabulary_is_read_in_parts(
    llama: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = SampleBatch.of(llama.samples)
    for method, threshold in (("q_exit", 0.5), ("confidence", 0.01)):
        setting = ExitSetting(token_exits()[method], tensors_of(llama, method), threshold, EXITS)
        whole = left(llama.model, batch, setting)
        with monkeypatch.context() as patched:
            patched.setattr(head_rows, "LOGITS_AT_ONCE", 7 * 256)
            parts = left(llama.model, batch, setting)
        assert torch.equal(parts.tokens, whole.tokens)
        assert torch.equal(parts.layers, whole.layers)
        assert len(whole.layers.unique()) > 2


@pytest.mark.parametrize("method", METHODS)
def test_turning_points_are_what_methods_look_at(llama: Calibration, method: str) -> None:
    states = TokenStates.of(llama, llama.samples[:3], 1000, 0)
    found = turning_points(
        llama.model, token_exits()[method], tensors_of(llama, method), EXITS, states.states
    )
    reference = Reference(llama.model.folder)
    for place in range(3):
        sample = llama.samples[place]
        heads = dict(llama.parts["heads"].heads)
        scores = reference.scores(sample.prompt, method, EXITS, NEW_TOKENS, heads)
        mine = found[:, states.owner == place].T.flatten()
        torch.testing.assert_close(mine, torch.tensor(scores), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lower", [False, True], ids=["above", "below"])
def test_a_grid_goes_from_strict_to_loose(lower: bool) -> None:
    points = torch.rand(3, 200, generator=torch.Generator().manual_seed(1))
    layers, full = (1, 2, 5), 8

    def depth(threshold: float) -> float:
        total = 0
        for column in points.T.tolist():
            leaving = [
                layer + 1
                for layer, point in zip(layers, column, strict=True)
                if (point <= threshold if lower else point >= threshold)
            ]
            total += min(leaving, default=full)
        return total / points.size(1)

    grid = threshold_grid(points, layers, full, 10, lower)
    assert grid == sorted(grid, reverse=not lower)
    # The last one lets all leave at the first exit; steps are equal but for a token or two.
    wanted = [8 - (8 - 2) * step / 10 for step in range(1, 11)]
    assert [depth(each) for each in grid] == pytest.approx(wanted, abs=0.06)


def test_a_grid_of_few_scores_has_no_repeats() -> None:
    grid = threshold_grid(torch.tensor([[0.5, 0.5, 0.25]]), (0,), 2, 10, False)
    assert grid == [0.5, 0.25]
    assert threshold_grid(torch.tensor([[0.5]]), (0,), 2, 3, True) == [0.5]


def brute(of: Calibration, method: str, threshold: float, layers: tuple[int, ...]) -> Any:
    """Share of each held prompt's tokens that differ, and mean depth, one prompt at a time."""
    setting = ExitSetting(token_exits()[method], tensors_of(of, method), threshold, layers)
    losses, depths = [], []
    for sample in TrainSplit.of(of).test:
        batch = SampleBatch.of([sample])
        found, full = left(of.model, batch, setting), full_tokens(of.model, batch)
        wrong = [a != b for a, b in zip(found.tokens.tolist(), full.tolist(), strict=True)]
        losses.append(sum(wrong) / len(wrong))
        depths += found.layers.tolist()
    return losses, sum(depths) / len(depths)


def test_the_loosest_threshold_that_passes_in_order_is_chosen(llama: Calibration) -> None:
    fields = LOOSE.run(llama).fields
    entries = {entry["method"]: ExitThreshold.model_validate(entry) for entry in fields["exits"]}
    assert set(entries) == set(METHODS)
    layers, stopped = (1, 3), 0
    grid = TokenStates.of(llama, TrainSplit.of(llama).train, LOOSE.tokens, llama.seed)
    full = likeliest(llama.model, grid.states[-1])
    right = torch.stack([likeliest(llama.model, grid.states[n + 1]) == full for n in layers])
    for method, entry in entries.items():
        rule = token_exits()[method]
        points = turning_points(llama.model, rule, tensors_of(llama, method), layers, grid.states)
        chosen = None
        for each in exit_candidates(
            points,
            right,
            grid.weights,
            layers,
            LAYERS,
            LOOSE.thresholds,
            0.8,
            lower_is_stricter=rule.leaves_below,
        ):
            losses, depth = brute(llama, method, each.threshold, each.layers)
            mean = sum(losses) / len(losses)
            if hoeffding_bentkus(mean, 0.8, len(losses)) > 0.2:
                stopped += 1
                break
            chosen = each.layers, each.threshold, 1 - mean, depth
        assert chosen is not None
        assert entry.layers == chosen[0]
        assert (entry.threshold, entry.agreement, entry.mean_layers) == pytest.approx(chosen[1:])
        assert (entry.tolerance, entry.error) == (0.8, 0.2)


@pytest.mark.parametrize("lower", [False, True], ids=["above", "below"])
def test_a_late_exit_is_found_where_early_ones_are_wrong(lower: bool) -> None:
    """At .99 after layer 27 of 30 tokens are right; before it a sure token is a wrong one."""
    layers, full = tuple(range(1, 29, 2)), 30
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(len(layers), 400, generator=generator)
    right = torch.zeros_like(points, dtype=torch.bool)
    right[-1] = points[-1] >= 0.9
    if lower:
        points = 1 - points
    found = exit_candidates(
        points, right, torch.ones(400), layers, full, 10, 0.05, lower_is_stricter=lower
    )
    assert found[0].layers == (27,)
    assert found[0].risk == 0.0
    # A few safer ones come first, then all save more and risk more.
    assert [each.depth for each in found] == sorted((e.depth for e in found), reverse=True)
    assert [each.risk for each in found] == sorted(each.risk for each in found)
    assert all(each.risk <= 0.1 for each in found)
    at = [1 - each.threshold if lower else each.threshold for each in found if each.risk == 0]
    assert min(at) == pytest.approx(0.9, abs=0.04)
    depth = full - 2 * (points[-1] <= 1 - min(at) if lower else points[-1] >= min(at)).float()
    safe = [each for each in found if each.risk == 0]
    assert safe[-1].depth == pytest.approx(float(depth.mean()), abs=0.05)


def test_full_depth_is_the_models_own_answer(llama: Calibration) -> None:
    found = full_tokens(llama.model, SampleBatch.of(llama.samples))
    assert found.tolist() == [token for sample in llama.samples for token in sample.answer[1:]]


def test_what_does_not_pass_has_no_entry(
    llama: Calibration, caplog: pytest.LogCaptureFixture
) -> None:
    step = Exits(tolerance=0.13, error=0.2, thresholds=4, first=0, every=1)
    assert step.refusal(llama) is None
    with caplog.at_level(logging.WARNING):
        fields = step.run(llama).fields
    entered = {entry["method"] for entry in fields["exits"]}
    assert entered != set(METHODS)
    for method in METHODS:
        assert (f"no threshold for {method}: none keeps" in caplog.text) != (method in entered)
        assert (method in fields["exit_failures"]) != (method in entered)


def test_without_heads_two_methods_have_none(
    llama: Calibration, caplog: pytest.LogCaptureFixture
) -> None:
    bare = calibration_of(llama.model.folder, drawn_prompts(24), llama.workspace.folder)
    with caplog.at_level(logging.WARNING):
        entries = LOOSE.run(bare).fields["exits"]
    assert [entry["method"] for entry in entries] == ["confidence", "entropy", "saturation"]
    for method in ("classifier", "q_exit"):
        assert f"no threshold for {method}: its head was not trained" in caplog.text


def test_one_seed_gives_one_result(llama: Calibration) -> None:
    step = Exits(tolerance=0.8, error=0.2, thresholds=3)
    first = step.run(llama).fields
    assert step.run(llama).fields == first
    assert len(first["saturation"]) == LAYERS
    llama.seed = 5
    try:
        assert step.run(llama).fields != first
    finally:
        llama.seed = 0


def similar(of: Calibration) -> SimilarTokens:
    batch = SampleBatch.of(of.samples)
    places = list(range(100, 100 + len(of.samples)))
    return SimilarTokens.of(of.model, batch, full_tokens(of.model, batch), places)


def test_cosines_and_agreement_of_layers(llama: Calibration) -> None:
    found, reference = similar(llama), Reference(llama.model.folder)
    for place, sample in enumerate(llama.samples[:4]):
        start, mine = len(sample.prompt), found.owner == 100 + place
        states = reference.states([*sample.prompt, *sample.answer[:-1]]).double()
        for layer in range(LAYERS):
            before, after = states[layer, start:], states[layer + 1, start:]
            cosine = torch.nn.functional.cosine_similarity(after, before)
            torch.testing.assert_close(
                found.cosines[layer, mine].double(), cosine, rtol=0, atol=1e-5
            )
            with torch.no_grad():
                model = reference.model
                tokens = model.lm_head(model.model.norm(after.float())).argmax(-1)
            expected = tokens == torch.tensor(sample.answer[1:])
            assert torch.equal(found.agrees[layer, mine], expected)
    assert found.agrees[-1].all()


def test_losses_of_similar_tokens_by_prompt() -> None:
    tokens = SimilarTokens(
        cosines=torch.tensor([[0.9, 0.8, 0.7, 0.9, 0.2, 0.95]]),
        agrees=torch.tensor([[True, False, False, False, True, True]]),
        owner=torch.tensor([0, 0, 0, 3, 5, 5]),
    )
    assert tokens.losses(0, 0.8).tolist() == [0.5, 1.0, 0.0]
    assert tokens.losses(0, 0.93).tolist() == [0.0]
    assert tokens.losses(0, -1.0).tolist() == pytest.approx([2 / 3, 1.0, 0.0])


def drawn_tokens(seed: int, prompts: int, limit: float) -> SimilarTokens:
    """Two layers and four tokens a prompt; those below `limit` are mostly wrong."""
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(2, 4 * prompts, generator=generator)
    right = torch.rand(2, 4 * prompts, generator=generator) > torch.where(
        cosines < limit, 0.6, 0.02
    )
    return SimilarTokens(cosines, right, torch.arange(prompts).repeat_interleave(4))


def test_layers_get_the_lowest_threshold_whose_risk_is_bounded() -> None:
    bound, broken, found = RiskBound(0.1, 0.2), 0, []
    runs = 200
    for seed in range(runs):
        train, held = (drawn_tokens(2 * seed + more, 150, 0.5) for more in (0, 1))
        thresholds = saturation_thresholds(train.cosines, train.owner, held, bound, 20)
        assert thresholds[1] == NEVER
        # The true risk, of another 20 000 prompts.
        found.append(thresholds[0])
    truth = drawn_tokens(999_999, 20_000, 0.5)
    for threshold in found:
        broken += threshold < NEVER and float(truth.losses(0, threshold).mean()) > 0.1
    assert broken / runs <= 0.2 + 2 * math.sqrt(0.16 / runs)
    # It finds the limit, and not only strict thresholds.
    assert 0.4 < sorted(found)[runs // 2] < 0.6


def test_layers_where_similarity_says_nothing_get_none() -> None:
    bound = RiskBound(0.1, 0.2)
    train, held = drawn_tokens(0, 150, 2.0), drawn_tokens(1, 150, 2.0)
    assert saturation_thresholds(train.cosines, train.owner, held, bound, 20) == [NEVER, NEVER]
    # Too few prompts to show anything, however good.
    train, held = drawn_tokens(0, 10, 0.0), drawn_tokens(1, 10, 0.0)
    assert saturation_thresholds(train.cosines, train.owner, held, bound, 20) == [NEVER, NEVER]


def test_refusals(llama: Calibration) -> None:
    refusal = Exits().refusal(llama)
    assert refusal is not None
    assert "12 prompts" in refusal
    assert "59" in refusal
    assert LOOSE.refusal(llama) is None
    refusal = Exits(tolerance=0.8, error=0.2, first=5).refusal(llama)
    assert refusal == "no exit: the model's last layer is 5, the first exit 5"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tolerance", 0.0),
        ("tolerance", 1.0),
        ("error", 0.0),
        ("error", 1.5),
        ("first", -1),
        ("every", 0),
        ("thresholds", 0),
        ("tokens", 0),
    ],
)
def test_options_out_of_range(llama: Calibration, name: str, value: float) -> None:
    step = Exits(**{name: value})
    for ask in (step.run, step.refusal):
        with pytest.raises(CalibrationError, match=f"exits: {name} must"):
            ask(llama)


def test_one_answer_with_a_second_token_is_too_few(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    of = calibration_of(tmp_path / "model", drawn_prompts(1), tmp_path / "work")
    with pytest.raises(CalibrationError, match="fewer than two answers"):
        LOOSE.run(of)
