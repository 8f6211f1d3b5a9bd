"""The search for skip sets: what it tries, what it keeps, and that it goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.calibration import TokenModel, calibration_of, drawn_prompts, example_of
from support.tiny import LAYERS, make_model

from sluice.models.depth.skip_order import Unit
from sluice.models.offline.calibrate.frontier import search as module
from sluice.models.offline.calibrate.frontier.greedy_levels import greedy_levels
from sluice.models.offline.calibrate.frontier.measure import Quality, SettingMeasure
from sluice.models.offline.calibrate.frontier.search import Search, seeds
from sluice.models.offline.calibrate.items import Items
from sluice.models.offline.calibrate.pipeline import engine_of
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.policy.policy import Phase, RoutingPolicy, SkipSet
from sluice.models.profile.layer_fields import FoundSkipSet

NEW_TOKENS = 6
PROMPTS = drawn_prompts(6, seed=4)
SEARCH = Search(trials=22, items=6, batch=3, timed=3, repeats=1, floor=0.0)
IMPORTANCE = {
    "block": [0.9, 0.1, 0.5, 0.4, 0.3, 0.8],
    "attention": [0.6, 0.5, 0.1, 0.3, 0.2, 0.4],
    "mlp": [0.7, 0.2, 0.3, 0.6, 0.5, 0.9],
}


def started(folder: Path, out: Path, **changes: Any) -> Calibration:
    calibration = calibration_of(folder, PROMPTS, out, new_tokens=NEW_TOKENS, **changes)
    return replace(calibration, parts={"importance": Part({"importance": IMPORTANCE})})


@pytest.fixture
def model(models_folder: Path) -> Path:
    return make_model("llama", models_folder / "search")


class Told:
    """Measures by a made-up rule, and remembers what was asked."""

    asked: ClassVar[list[SkipSet]]
    stop_after: ClassVar[int]

    def __init__(self, *_given: Any) -> None:
        self.full = Quality(1.0, None)  # type: ignore[arg-type]

    def quality(self, policy: RoutingPolicy) -> Quality:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(policy.skip)
        harm = sum(1 + layer for layer in policy.skip.attention) / 60
        harm += sum(2 * (LAYERS - layer) for layer in policy.skip.mlp) / 120
        return Quality(max(0.0, 1 - harm), None)  # type: ignore[arg-type]

    def ratios(self, policy: RoutingPolicy, repeats: int) -> list[float]:
        left_out = len(policy.skip.attention) + 2 * len(policy.skip.mlp)
        return [1 / (1 - left_out / (3 * LAYERS + 1))] * repeats


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> type[Told]:
    class Fresh(Told):
        asked: ClassVar[list[SkipSet]] = []
        stop_after = -1

    class NoEngine:
        def __init__(self, *_given: Any) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_given: Any) -> None:
            pass

    monkeypatch.setattr(module, "SettingMeasure", Fresh)
    monkeypatch.setattr(module, "engine_of", NoEngine)
    return Fresh


def found_of(part: Part) -> dict[str, FoundSkipSet]:
    return {name: FoundSkipSet(**wire) for name, wire in part.fields["skip_sets"].items()}


def test_measured_in_an_engine(model: Path, tmp_path: Path) -> None:
    calibration = started(model, tmp_path)
    found = found_of(Search(trials=9, items=6, batch=3, timed=3, repeats=1).run(calibration))
    assert list(found) == [f"search-{number}" for number in range(1, len(found) + 1)]
    assert [each.quality for each in found.values()] == sorted(
        (each.quality for each in found.values()), reverse=True
    )
    trials = module._Kept(calibration, _kept_key(calibration)).trials
    assert len(trials) == 9
    items = Items.of(calibration, 6, 6)
    with engine_of(calibration, items.longest, 6) as engine:
        measure = SettingMeasure(calibration, engine, items, 3, 3)
        for trial in trials[:4]:
            agreed = measure.tokens(RoutingPolicy(trial.skip))[0].agreement.value
            assert trial.quality == pytest.approx(agreed)
    assert trials[0].skip.empty
    assert trials[0].quality == 1.0
    assert all(trial.seconds > 0 for trial in trials)


def _tokens(engine: Any, items: Items, policy: RoutingPolicy) -> Sequence[tuple[int, ...]]:
    limits = [NEW_TOKENS] * len(items.prompts)
    answers: Sequence[tuple[int, ...]] = engine.answers(
        items.prompts, policy, limits, items.ends, 6
    ).tokens
    return answers


def _kept_key(calibration: Calibration) -> str:
    import json

    held = json.loads((calibration.workspace.folder / "search-trials.json").read_text())
    key: str = held["key"]
    return key


def first_of(calibration: Calibration) -> list[SkipSet]:
    levels = greedy_levels(calibration, calibration.samples, LAYERS // 2, sub_layers=False)
    importance = {Unit(unit): values for unit, values in IMPORTANCE.items()}
    return seeds(LAYERS, importance, [level.unit for level in levels])


def test_the_chain_and_what_llm_drop_leaves_out_are_tried_first(
    model: Path, tmp_path: Path, told: type[Told]
) -> None:
    calibration = started(model, tmp_path)
    SEARCH.run(calibration)
    first = first_of(calibration)
    assert told.asked[: len(first)] == first
    assert first[0].empty
    levels = greedy_levels(calibration, calibration.samples, LAYERS // 2, sub_layers=False)
    nested = [level.unit[1] for level in levels]
    assert nested[0] != 1, "the greedy order and LLM-Drop's differ"
    assert first[1] == SkipSet.of(blocks=nested[:1], phase=Phase.DECODE)
    assert first[2] == SkipSet.of(blocks=(1,), phase=Phase.DECODE)
    assert first[3] == SkipSet.of(attention=(2,), phase=Phase.DECODE)
    assert SkipSet.of(blocks=nested[:2], phase=Phase.DECODE) in first
    assert SkipSet.of(blocks=nested[:3], phase=Phase.DECODE) in first
    # Joint order: 0.1 attention 2, 0.2 attention 4, 0.2 MLP 1, of equals the deeper one first.
    assert SkipSet.of(attention=(2, 4), phase=Phase.DECODE) in first
    assert SkipSet.of(attention=(2, 4), mlp=(1,), phase=Phase.DECODE) in first
    assert len(first) == len({*first})
    proposed = told.asked[len(first) :]
    assert proposed
    assert not {*proposed} & {*first}
    assert len({*told.asked}) == len(told.asked)


def test_the_sets_kept_are_those_that_no_other_beats(
    model: Path, tmp_path: Path, told: type[Told]
) -> None:
    found = found_of(replace(SEARCH, trials=70, floor=0.8).run(started(model, tmp_path)))
    # What is proposed once more is not measured once more.
    assert len({*told.asked}) == len(told.asked) < 70
    rule = told()
    tried = {
        skip: (rule.quality(RoutingPolicy(skip)).value, 1 / rule.ratios(RoutingPolicy(skip), 1)[0])
        for skip in [*told.asked]
    }
    expected, poor = set(), 0
    for skip, (quality, seconds) in tried.items():
        beaten = any(
            q >= quality and s <= seconds and (q, s) != (quality, seconds)
            for q, s in tried.values()
        )
        poor += not beaten and quality < 0.8
        if not beaten and quality >= 0.8 and not skip.empty:
            expected.add(skip)
    assert poor
    kept = {
        SkipSet.of(attention=each.attention, mlp=each.mlp, phase=Phase.DECODE): each
        for each in found.values()
    }
    assert kept.keys() == expected
    for skip, each in kept.items():
        assert (each.quality, each.seconds) == pytest.approx(tried[skip])


def test_a_search_that_was_stopped_goes_on(model: Path, tmp_path: Path, told: type[Told]) -> None:
    whole = SEARCH.run(started(model, tmp_path / "whole"))
    asked = [*told.asked]
    told.asked.clear()
    for stop in (2, len(asked) - 2):
        told.stop_after = stop
        with pytest.raises(KeyboardInterrupt):
            SEARCH.run(started(model, tmp_path / "cut"))
    told.stop_after = -1
    assert SEARCH.run(started(model, tmp_path / "cut")) == whole
    assert told.asked == asked
    SEARCH.run(started(model, tmp_path / "cut"))
    assert told.asked == asked
    # More trials go on from there; another seed proposes others, from the start.
    replace(SEARCH, trials=26).run(started(model, tmp_path / "cut"))
    assert told.asked[: len(asked)] == asked
    assert len(told.asked) > len(asked)
    told.asked.clear()
    other = started(model, tmp_path / "cut", seed=1)
    SEARCH.run(other)
    first = first_of(other)
    assert told.asked[: len(first)] == first
    assert told.asked != asked


def test_no_trial_is_begun_after_the_timeout(model: Path, tmp_path: Path, told: type[Told]) -> None:
    part = replace(SEARCH, timeout=-1.0).run(started(model, tmp_path))
    assert told.asked == []
    assert part.fields["skip_sets"] == {}


def test_quality_is_exact_match_where_there_are_tasks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right answers are those without layer 2, so full depth is not the best there is."""

    def spaced(_self: TokenModel, ids: Sequence[int]) -> str:
        return f"\n{' '.join(map(str, ids))} "

    monkeypatch.setattr(TokenModel, "decode", spaced)
    skip = RoutingPolicy(SkipSet.of(blocks=(2,), phase=Phase.DECODE))
    calibration = started(model, tmp_path)
    items = Items.of(calibration, 6, 6)
    with engine_of(calibration, items.longest, 6) as engine:
        full, other = (_tokens(engine, items, p) for p in (RoutingPolicy(), skip))
        decode = calibration.model.decode
        right = [*other[:4], *full[4:]]
        tasks = [
            example_of(prompt, answer=f" {decode(answer)}\n\n")
            for prompt, answer in zip(PROMPTS, right, strict=True)
        ]
        asked = replace(calibration, tasks=tuple(tasks))
        measure = SettingMeasure(asked, engine, Items.of(asked, 6, 6), 3, 3)
        agreed = SettingMeasure(calibration, engine, items, 3, 3)
        same = sum(a == b for a, b in zip(full, other, strict=True))
        assert same < 4
        assert measure.full.value == pytest.approx(_equal(full, right) / 6)
        assert measure.quality(skip).value == pytest.approx(_equal(other, right) / 6)
        assert agreed.full.value == 1.0
        assert agreed.quality(skip).value < 1.0
        wrong = replace(calibration, tasks=(example_of(PROMPTS[0], answer="none"),))
        with pytest.raises(CalibrationError, match="none of the tasks right"):
            SettingMeasure(wrong, engine, Items.of(wrong, 6, 6), 3, 3)
    assert Items.of(asked, 6, 6).measure == "exact match"
    assert items.measure == "token agreement"
    assert (len(Items.of(asked, 4, 2).tasks), len(Items.of(asked, 4, 2).prompts)) == (4, 2)


def _equal(given: Sequence[tuple[int, ...]], right: Sequence[tuple[int, ...]]) -> int:
    return sum(a == b for a, b in zip(given, right, strict=True))
