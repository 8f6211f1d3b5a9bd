"""Nested levels, against a slow transformers reference of each set."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration import calibration_of, drawn_prompts
from support.reference import Reference
from support.tiny import LAYERS, make_model

from sluice.models.depth.skip_order import Unit
from sluice.models.offline.calibrate.frontier import greedy_levels as module
from sluice.models.offline.calibrate.frontier.agreement import agreement, teacher_forced
from sluice.models.offline.calibrate.frontier.greedy_levels import (
    drawn,
    greedy_levels,
    level_samples,
    uniform,
    units,
    without,
)
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.samples import Sample
from sluice.models.policy.policy import Phase, SkipSet

NEW_TOKENS = 7
PROMPTS = drawn_prompts(6, seed=2)


@pytest.fixture(params=["llama", "qwen3_moe", "gpt_oss"])
def calibration(request: pytest.FixtureRequest, models_folder: Path, tmp_path: Path) -> Calibration:
    model = make_model(request.param, models_folder / f"chain-{request.param}")
    return calibration_of(model, PROMPTS, tmp_path, new_tokens=NEW_TOKENS)


@pytest.fixture
def llama(models_folder: Path, tmp_path: Path) -> Calibration:
    model = make_model("llama", models_folder / "chain-llama")
    return calibration_of(model, PROMPTS, tmp_path, new_tokens=NEW_TOKENS)


def likelihood(reference: Reference, sample: Sample, skip: SkipSet) -> float:
    """Of the answer's tokens from the second on, one pass a token."""
    whole, total = [*sample.prompt, *sample.answer], 0.0
    for length in range(len(sample.prompt) + 1, len(whole)):
        ran = reference._static(skip, len(sample.prompt), length)
        with torch.no_grad(), reference._hooks(ran, _nothing()):
            logits = reference.model(torch.tensor([whole[:length]])).logits[0, -1]
        total += float(logits.log_softmax(-1)[whole[length]])
    return total


def _nothing() -> Any:
    from support.references.watches import Watch

    return Watch()


def batches(calibration: Calibration) -> list[Any]:
    return [batch for _, batch in calibration.model.batches(calibration.samples)]


@pytest.mark.parametrize(
    "skip",
    [
        SkipSet(),
        SkipSet.of(blocks=(1, 4), phase=Phase.DECODE),
        SkipSet.of(attention=(0, 3), phase=Phase.DECODE),
        SkipSet.of(mlp=(2, 5), attention=(2,), phase=Phase.DECODE),
    ],
    ids=["full depth", "blocks", "attention", "mixed"],
)
def test_a_forced_pass_is_what_generating_freely_gives(
    calibration: Calibration, skip: SkipSet
) -> None:
    reference = Reference(calibration.model.folder)
    found = teacher_forced(calibration.model, batches(calibration), skip)
    free = [
        agreement(sample.answer, reference.greedy(sample.prompt, skip, len(sample.answer)))
        for sample in calibration.samples
    ]
    assert found.agreement == pytest.approx(sum(free) / len(free), abs=1e-9)
    assert (found.agreement == 1.0) == skip.empty
    total = sum(likelihood(reference, sample, skip) for sample in calibration.samples)
    tokens = sum(len(sample.answer) - 1 for sample in calibration.samples)
    assert found.log_likelihood == pytest.approx(total / tokens, abs=1e-4)


def test_agreement_stops_at_the_first_difference() -> None:
    assert agreement([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0
    assert agreement([1, 2, 3, 4], [1, 9, 3, 4]) == 0.25
    assert agreement([1, 2, 3, 4], [1, 2]) == 0.5
    assert agreement([1, 2], [1, 2, 3]) == 1.0
    assert agreement([1], [2]) == 0.0


@pytest.mark.parametrize("sub_layers", [False, True])
def test_every_link_is_the_unit_missed_least(llama: Calibration, sub_layers: bool) -> None:
    every = units(LAYERS, sub_layers=sub_layers)
    levels = greedy_levels(llama, llama.samples, 4, sub_layers=sub_layers)
    gone: list[tuple[Unit, int]] = []
    for level in levels:
        rivals = {
            unit: teacher_forced(llama.model, batches(llama), without([*gone, unit]))
            for unit in every
            if unit not in gone
        }
        assert level.forced.log_likelihood == max(v.log_likelihood for v in rivals.values())
        assert rivals[level.unit] == level.forced
        gone.append(level.unit)
    assert len({*gone}) == 4
    kinds = {kind for kind, _ in gone}
    assert kinds <= ({Unit.ATTENTION, Unit.MLP} if sub_layers else {Unit.BLOCK})


def test_a_chain_that_was_stopped_goes_on(
    llama: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = greedy_levels(llama, llama.samples, 4, sub_layers=False)
    for name in ("chain.json", "chain-last.json"):
        (llama.workspace.folder / name).unlink()
    passes, real = [], teacher_forced

    def stopping(model: Any, given: Any, skip: SkipSet) -> Any:
        passes.append(skip)
        # In the middle of the third level's search.
        if len(passes) == 6 + 5 + 2:
            raise KeyboardInterrupt
        return real(model, given, skip)

    monkeypatch.setattr(module, "teacher_forced", stopping)
    with pytest.raises(KeyboardInterrupt):
        greedy_levels(llama, llama.samples, 4, sub_layers=False)
    begun = len(passes)
    assert greedy_levels(llama, llama.samples, 4, sub_layers=False) == whole
    assert len(passes) - begun == 4 + 3
    assert all(len(skip.mlp) >= 3 for skip in passes[begun:])
    # What is known needs no pass, and other samples are other levels.
    assert greedy_levels(llama, llama.samples, 3, sub_layers=False) == whole[:3]
    assert len(passes) - begun == 4 + 3
    greedy_levels(llama, llama.samples[:3], 1, sub_layers=False)
    assert len(passes) - begun == 4 + 3 + 6


def test_later_rounds_may_try_the_most_promising_units_only(
    llama: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, real = [], teacher_forced

    def counted(model: Any, given: Any, skip: SkipSet) -> Any:
        passes.append(skip)
        return real(model, given, skip)

    monkeypatch.setattr(module, "teacher_forced", counted)
    levels = greedy_levels(llama, llama.samples, 4, sub_layers=False, tried=2)
    assert len(passes) == LAYERS + 3 * 2
    by_itself = {
        layer: real(llama.model, batches(llama), SkipSet.of(blocks=(layer,), phase=Phase.DECODE))
        for layer in range(LAYERS)
    }
    order = sorted(by_itself, key=lambda layer: -by_itself[layer].log_likelihood)
    assert levels[0].unit == (Unit.BLOCK, order[0])
    assert levels[1].unit[1] in order[1:3]
    # As many prompts as are worth their time.
    assert [level_samples(n, 0) for n in (6, 30, 80)] == [64, 16, 8]
    assert level_samples(30, 5) == 5


def test_answers_of_one_token_say_nothing(models_folder: Path, tmp_path: Path) -> None:
    model = make_model("llama", models_folder / "chain-llama")
    calibration = calibration_of(model, PROMPTS, tmp_path, new_tokens=1)
    with pytest.raises(CalibrationError, match="no answer has a second token"):
        greedy_levels(calibration, calibration.samples, 2, sub_layers=False)
    with pytest.raises(ValueError, match="6 of 6 units"):
        greedy_levels(calibration, calibration.samples, LAYERS, sub_layers=False)


@pytest.mark.parametrize("sub_layers", [False, True])
def test_other_ways_to_choose_as_many(sub_layers: bool) -> None:
    every = units(8, sub_layers=sub_layers)
    for count in range(1, len(every)):
        for chosen in (uniform(every, count), drawn(every, count, 3)):
            assert len({*chosen}) == count
            assert list(chosen) == [unit for unit in every if unit in chosen]
        gaps = _gaps([every.index(unit) for unit in uniform(every, count)])
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
    picks = {drawn(every, 4, seed) for seed in range(5)}
    assert len(picks) == 5
    assert drawn(every, 4, 1) == drawn(every, 4, 1)
    state = random.getstate()
    drawn(every, 4, 1)
    assert random.getstate() == state


def _gaps(places: Sequence[int]) -> list[int]:
    return [b - a for a, b in pairwise(places)]


def test_half_of_the_blocks_is_every_other_one() -> None:
    every = units(8, sub_layers=False)
    assert [layer for _, layer in uniform(every, 4)] == [1, 3, 5, 7]
    assert [layer for _, layer in uniform(every, 1)] == [4]
    joint = units(2, sub_layers=True)
    assert joint == ((Unit.ATTENTION, 0), (Unit.MLP, 0), (Unit.ATTENTION, 1), (Unit.MLP, 1))
    assert without(joint[:3]) == SkipSet((0, 1), (0,), Phase.DECODE)
