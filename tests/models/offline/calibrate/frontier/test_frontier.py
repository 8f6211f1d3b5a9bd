"""The frontier: what is tried, what is kept of it, and that it goes on where it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp
from support import edge
from support.calibration import calibration_of, drawn_prompts, example_of
from support.tiny import LAYERS, make_model

from sluice.models.offline.calibrate.frontier import frontier as module
from sluice.models.offline.calibrate.frontier.frontier import Frontier
from sluice.models.offline.calibrate.frontier.measure import Quality, SettingMeasure
from sluice.models.offline.calibrate.frontier.pareto import Allowance, choose
from sluice.models.offline.calibrate.frontier.search import Search
from sluice.models.offline.calibrate.items import Items
from sluice.models.offline.calibrate.pipeline import engine_of, run_steps
from sluice.models.offline.calibrate.registry import STEPS
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.evaluate.work import Work
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.intervals import corrected
from sluice.models.offline.report.charts import EQUAL_COMPUTE_PNG, FRONTIER_PNG, write_plots
from sluice.models.offline.report.frontier import frontier_table, preset_lines
from sluice.models.policy.policy import Phase, RoutingPolicy, SkipSet
from sluice.models.profile.frontier_fields import FrontierFields, TokenMeasures
from sluice.models.profile.values import Interval
from sluice.models.routing.errors import RoutingError

NEW_TOKENS = 6
PROMPTS = drawn_prompts(5, seed=6)
IMPORTANCE = {
    "block": [0.9, 0.1, 0.5, 0.4, 0.3, 0.8],
    "attention": [0.6, 0.5, 0.1, 0.3, 0.2, 0.4],
    "mlp": [0.7, 0.2, 0.3, 0.6, 0.5, 0.9],
}
EXIT = {
    "method": "confidence",
    "layers": [2, 4],
    "threshold": 0.02,
    "tolerance": 0.05,
    "error": 0.05,
    "agreement": 0.97,
    "mean_layers": 4.0,
}
FOUND = {"attention": [2, 4], "mlp": [4], "quality": 0.9, "seconds": 0.8}
PARTS = {
    "importance": Part({"importance": IMPORTANCE}),
    "exits": Part({"exits": [EXIT]}),
    "routers": Part(
        heads={"first.weight": torch.full((LAYERS, 64), 0.01), "first.bias": torch.zeros(LAYERS)}
    ),
    "search": Part({"skip_sets": {"search-1": FOUND}}),
}
EXPERT_PARTS = {
    "expert-k": Part({"expert_k": [{"budget": 7, "top_k": [1, 2, 2, 1, 1, 1], "divergence": 1.0}]}),
    "skip-ratios": Part({"skip_ratios": [0.6, 0.0, 0.5, 0.4, 0.5, 0.6]}),
}
STEP = Frontier(
    items=5, batch=3, timed=3, repeats=6, levels=2, samples=4, draws=2, combined=1, least=0.0
)


def started(folder: Path, out: Path, parts: dict[str, Part] = PARTS) -> Calibration:
    calibration = calibration_of(folder, PROMPTS, out, new_tokens=NEW_TOKENS)
    return replace(calibration, parts=dict(parts))


@pytest.fixture
def llama(models_folder: Path) -> Path:
    return make_model("llama", models_folder / "frontier-llama")


@pytest.fixture
def qwen3_moe(models_folder: Path) -> Path:
    return make_model("qwen3_moe", models_folder / "frontier-qwen3-moe")


def fields_of(part: Part) -> FrontierFields:
    return FrontierFields.model_validate(part.fields["frontier"])


def presets_of(found: FrontierFields) -> dict[str, str]:
    return choose(found.points, Allowance.of(found.points, found.noise, found.measure))


def check_against_engine(found: FrontierFields, calibration: Calibration) -> None:
    """Quality and compute of every point are those of an engine by itself."""
    items = Items.of(calibration, 5, 5)
    with engine_of(calibration, items.longest, 5) as made:
        measure = SettingMeasure(calibration, made, items, 5, 3)
        for point in found.points:
            tokens, work = measure.tokens(made.resolve(point.routing))
            assert point.tokens is not None
            assert point.tokens.agreement == tokens.agreement, point.name
            assert point.tokens.divergence == pytest.approx(tokens.divergence, abs=1e-5)
            assert point.tokens.perplexity == pytest.approx(tokens.perplexity, rel=1e-3)
            assert point.quality == tokens.agreement
            assert point.compute_fraction == pytest.approx(work.compute_fraction, abs=1e-6)
            assert point.generated_fraction == pytest.approx(
                work.generated_compute_fraction, abs=1e-6
            )


def test_a_dense_model(llama: Path, tmp_path: Path) -> None:
    calibration = started(llama, tmp_path)
    found = fields_of(STEP.run(calibration))
    names = [point.name for point in found.points]
    assert names[0] == "full depth"
    assert {"search-1", "first at 0.5", "exit by confidence at 0.02"} <= {*names}
    assert "drop 50.0% of blocks" in names
    assert not [name for name in names if "experts" in name]
    full = found.points[0]
    assert (full.quality.value, full.compute_fraction, full.generated_fraction) == (1.0, 1.0, 1.0)
    assert (found.measure, found.items, found.batch) == ("token agreement", 5, 3)
    assert found.device.endswith("cores")
    assert len({json.dumps(point.routing, sort_keys=True) for point in found.points}) == len(names)
    check_against_engine(found, calibration)
    # Of the blocks 1, 4 are the least important: generated tokens ran the other four.
    dropped = next(point for point in found.points if point.name == "drop 25.0% of blocks")
    # Beside them it ran the LM head.
    assert 4 / 6 < dropped.generated_fraction < 5 / 6
    assert found.presets == presets_of(found)
    check_levels(found)


def check_levels(found: FrontierFields) -> None:
    assert len(found.effort) == 2
    before: set[tuple[str, int]] = set()
    for level in found.effort:
        own = {("attention", i) for i in level.attention} | {("mlp", i) for i in level.mlp}
        assert own > before
        before = own
    assert found.effort[0].effort > found.effort[1].effort
    points = {point.name: point for point in found.points}
    for level in found.effort:
        named = points[f"level {len(level.mlp)}"]
        assert named.quality == level.quality
        assert named.generated_fraction == level.effort
        assert named.routing["depth"]["skip"] == {"blocks": [*level.mlp]}
    by_level = [entry for entry in found.equal_compute if entry.chosen == "chain"]
    assert [entry.quality for entry in by_level] == [level.quality for level in found.effort]
    assert len(found.equal_compute) == 2 * (1 + 1 + STEP.draws)
    for entry in found.equal_compute:
        level = next(each for each in found.effort if len(each.mlp) == entry.units)
        assert entry.generated_fraction == pytest.approx(level.effort, rel=0.05)
        assert (entry.seed is None) == (entry.chosen != "random")


def test_a_mixture_of_experts_and_its_profile(qwen3_moe: Path, tmp_path: Path) -> None:
    """Through the pipeline: the profile that comes out is one that loads."""
    # No token leaves, and hardly an expert: as good as full depth, so tried together.
    harmless = {
        "exits": Part({"exits": [{**EXIT, "threshold": 1.0}]}),
        "skip-ratios": Part({"skip_ratios": [1e-5, 0.0, *[1e-5] * 4]}),
    }
    parts = {**PARTS, **EXPERT_PARTS, **harmless}
    # Its settings may be harmless too, and the clock would choose.
    del parts["routers"]
    calibration = started(qwen3_moe, tmp_path, parts)
    profile = run_steps(calibration, [STEP], tmp_path, lambda _line: None)
    found = profile.frontier
    assert found is not None
    names = [point.name for point in found.points]
    assert {"7 experts over the layers", "skip ratios times 1", "1 of 2 experts"} <= {*names}
    both = [p for p in found.points if {"depth", "experts"} <= p.routing.keys()]
    assert len(both) == 1
    # Which of those that lose nothing is the fastest is for the clock to say.
    depth, experts = both[0].name.split(", ")
    assert depth in names
    assert experts in names
    check_against_engine(found, replace(calibration, parts=parts))
    table = frontier_table(found)
    assert table.row_count == len(found.points)
    for path in write_plots(found, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / FRONTIER_PNG).exists()
    assert (tmp_path / EQUAL_COMPUTE_PNG).exists()


class Told:
    """Measures by a made-up rule, and remembers what was asked."""

    asked: ClassVar[list[tuple[str, str]]]
    stop_after: ClassVar[int]

    def __init__(self, *_given: Any) -> None:
        self.full = self._found(RoutingPolicy())

    def quality(self, policy: RoutingPolicy) -> Quality:
        self._note("quality", policy)
        return self._found(policy)

    def tokens(self, policy: RoutingPolicy) -> tuple[TokenMeasures, None]:
        """Exits after the last layers but two are nearly free, and no sub-layer more than two."""
        self._note("tokens", policy)
        lost = 0.04 * (len(policy.skip.mlp) + len(policy.skip.attention))
        if policy.exit is not None:
            lost = 0.01 if policy.exit.layers[0] >= LAYERS - 3 else 0.9
        found = Interval(value=1 - lost, low=0.0, high=1.0)
        return TokenMeasures(agreement=found, divergence=0.0, perplexity=1.0), None

    def ratios(self, policy: RoutingPolicy, repeats: int) -> list[float]:
        self._note("ratios", policy)
        speed = 1 + 0.3 * len(policy.skip.mlp) + 0.1 * len(policy.skip.attention)
        speed += 0.5 * (policy.experts.top_k is not None)
        return [speed - 0.001, speed, speed + 0.001] * (repeats // 3)

    def noise(self) -> TokenMeasures:
        return TokenMeasures(
            agreement=Interval(value=1.0, low=1.0, high=1.0), divergence=0.0, perplexity=1.0
        )

    def _found(self, policy: RoutingPolicy) -> Quality:
        skipped = len(policy.skip.mlp) + len(policy.skip.attention)
        loss = 0.004 * skipped + 0.01 * (policy.experts.skip_ratio is not None)
        loss += 0.5 * (policy.exit is not None or policy.adaptive is not None)
        ran = 1 - skipped / (2 * LAYERS)
        return Quality(1 - loss, Work(10, ran * LAYERS, ran, (1 + ran) / 2))

    @classmethod
    def _note(cls, what: str, policy: RoutingPolicy) -> None:
        if len(cls.asked) == cls.stop_after:
            raise KeyboardInterrupt
        cls.asked.append((what, policy.digest))


class FakeEngine:
    """An engine that is made up; its policies are the edge's own."""

    mode = "eager"
    expert_answer: ClassVar[dict[str, Any]] = {"shape": edge.PLAIN_SHAPE.to_dict()}
    capabilities = replace(
        edge.MOE, profile=edge.profile_of("classifier", "first", importance=IMPORTANCE)
    )

    def resolve(self, routing: Mapping[str, Any]) -> RoutingPolicy:
        return edge.policy(dict(routing), self.capabilities)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> type[Told]:
    class Fresh(Told):
        asked: ClassVar[list[tuple[str, str]]] = []
        stop_after: ClassVar[int] = -1

    @contextmanager
    def no_engine(*_given: Any) -> Any:
        yield FakeEngine()

    monkeypatch.setattr(module, "SettingMeasure", Fresh)
    monkeypatch.setattr(module, "engine_of", no_engine)
    return Fresh


def invented(folder: Path, out: Path) -> Calibration:
    """A calibration for `FakeEngine`."""
    tasks = tuple(example_of(prompt, answer="1") for prompt in PROMPTS)
    return replace(started(folder, out, {**PARTS, **EXPERT_PARTS}), tasks=tasks)


def test_a_run_that_was_stopped_goes_on(llama: Path, tmp_path: Path, told: type[Told]) -> None:
    step = replace(STEP, combined=2)
    whole = step.run(invented(llama, tmp_path / "whole"))
    asked = [*told.asked]
    assert len({*asked}) == len(asked)
    told.asked.clear()
    for stop in (1, 4, len(asked) - 3):
        told.stop_after = stop
        with pytest.raises(KeyboardInterrupt):
            step.run(invented(llama, tmp_path / "cut"))
    told.stop_after = -1
    assert step.run(invented(llama, tmp_path / "cut")) == whole
    assert told.asked == asked
    # Other choices are measured beside what is there; other repeats anew.
    more = replace(step, draws=4)
    more.run(invented(llama, tmp_path / "cut"))
    again = told.asked[len(asked) :]
    assert {*told.asked[: len(asked)]}.isdisjoint(again)
    assert again
    told.asked.clear()
    replace(step, repeats=9).run(invented(llama, tmp_path / "cut"))
    assert told.asked == asked


def test_presets_and_combinations(llama: Path, tmp_path: Path, told: type[Told]) -> None:
    found = fields_of(STEP.run(invented(llama, tmp_path)))
    points = {point.name: point for point in found.points}
    assert found.presets == presets_of(found)
    # A preset that would be the point of a stricter one is left to that one.
    assert len({*found.presets.values()}) == len(found.presets) > 0
    full = points["full depth"]
    for name, loss in (("quality", 0.005), ("balanced", 0.01), ("fast", 0.03)):
        able = [p for p in found.points if p.quality.value >= full.quality.value - loss - 1e-9]
        fastest = max(able, key=lambda p: p.speed.value)
        if name not in found.presets:
            assert fastest.name in found.presets.values()
            continue
        assert points[found.presets[name]] == fastest
        assert fastest.on_frontier
    # Six sub-layers are a loss of 2.4 points; the fastest expert setting is `top_k`, at no loss.
    last = points[[*found.presets.values()][-1]]
    assert len(last.routing["depth"]["skip"]) >= 1
    assert last.routing["experts"].keys() == {"top_k"}
    both = [point for point in found.points if len(point.routing) == 2]
    assert len(both) == 1
    named = [line.split(":")[0] for line in preset_lines(found).splitlines()]
    assert named == [*found.presets]
    # Wilson's interval of five items is wide.
    assert [note.split(" loses")[0] for note in found.notes] == [
        f"preset {name!r}" for name in found.presets
    ]
    assert "at most 0.5 (quality), 1 (balanced), 3 (fast) points fewer of the tasks" in (
        found.chosen_by
    )


def test_gains_within_the_noise_are_no_preset(
    llama: Path,
    tmp_path: Path,
    told: type[Told],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A median of 1.2 times full depth's speed, and repeats that show nothing of it."""
    monkeypatch.setattr(told, "ratios", lambda *_given: [0.6, 1.2, 1.2, 1.2, 1.3, 0.7])
    with caplog.at_level(logging.WARNING):
        found = fields_of(STEP.run(invented(llama, tmp_path)))
    assert found.presets == {}
    assert found.points[0].faster is None
    assert all(p.faster is not None and p.faster > 0.05 for p in found.points[1:])
    note = "no setting is shown to be faster than full depth, and there are no presets"
    assert found.notes == (note,)
    assert f"frontier: {note}" in caplog.text


def test_how_sure_a_gain_is_depends_on_how_many_are_tried(
    llama: Path, tmp_path: Path, told: type[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One lucky setting among those that gain nothing."""
    alike, lucky = [0.9, 1.1, 0.95, 1.05, 0.98, 1.02], [1.0, 1.1, 1.2, 1.0, 1.15, 1.02]

    def ratios(_self: Told, policy: RoutingPolicy, _repeats: int) -> list[float]:
        return alike if policy.experts.top_k is None else lucky

    monkeypatch.setattr(told, "ratios", ratios)
    calibration = invented(llama, tmp_path)
    del calibration.parts["expert-k"]
    found = fields_of(STEP.run(calibration))
    chance, luck = (
        float(ttest_1samp(np.log(each), 0.0, alternative="greater").pvalue)
        for each in (alike, lucky)
    )
    assert luck < 0.05 < chance
    is_lucky = ["top_k" in p.routing.get("experts", {}) for p in found.points[1:]]
    assert 0 < sum(is_lucky) < 4
    want = corrected([luck if each else chance for each in is_lucky])
    assert np.allclose([p.faster for p in found.points[1:]], want)
    assert min(want) > 0.05
    assert found.presets == {}


def test_where_nothing_is_good_enough_presets_are_full_depth(
    llama: Path, tmp_path: Path, told: type[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = told._found

    def poor(self: Told, policy: RoutingPolicy) -> Quality:
        found = real(self, policy)
        return found if policy.stock else replace(found, value=found.value - 0.1)

    monkeypatch.setattr(told, "_found", poor)
    found = fields_of(STEP.run(invented(llama, tmp_path)))
    assert found.presets == {}
    assert found.notes == (
        "every setting that is shown to be faster loses too much, and there are no presets",
    )
    assert preset_lines(found) == "no presets: serve the model at full depth"


def test_what_is_nearly_free_is_found_down_to_one_sub_layer(
    llama: Path, tmp_path: Path, told: type[Told]
) -> None:
    found = fields_of(replace(STEP, least=0.5).run(invented(llama, tmp_path)))
    names = {point.name for point in found.points}
    # A sub-layer costs 4 points of tokens, and `fast` may lose 10: two, the least important ones.
    assert {"1 MLP left out", "2 MLPs left out"} <= names
    assert "3 MLPs left out" not in names
    points = {point.name: point for point in found.points}
    assert points["2 MLPs left out"].routing["depth"]["skip"] == {"attention": [], "mlp": [1, 2]}
    assert points["1 attention left out"].routing["depth"]["skip"]["attention"] == [2]
    # The exit of all layers from 2 on loses nearly everything; late ones next to nothing.
    last = LAYERS - 2
    assert f"exit at 0.99 after layer {last}" in names
    assert f"exit at 0.99 after layer {last - 1}" in names
    assert f"exit at 0.99 after layer {last - 2}" not in names
    failed = {each.name: each.reason for each in found.failed}
    assert failed["exit by confidence at 0.02"] == "agrees with 10.0% of full depth's tokens"
    asked = {digest for what, digest in told.asked if what == "ratios"}
    resolved = {FakeEngine().resolve(each.routing).digest for each in found.failed}
    assert resolved.isdisjoint(asked)


def test_settings_that_come_to_one_policy_are_one_point(
    llama: Path, tmp_path: Path, told: type[Told]
) -> None:
    calibration = invented(llama, tmp_path)
    same = {**FOUND, "attention": [1], "mlp": [1]}
    calibration.parts["search"] = Part({"skip_sets": {"search-1": FOUND, "search-2": same}})
    names = [point.name for point in fields_of(STEP.run(calibration)).points]
    # 12.5 % of six blocks are one, the least important.
    assert ("drop 12.5% of blocks" in names) or ("level 1" in names)
    assert "search-1" in names
    assert "search-2" not in names


def test_it_reads_steps_that_run_before_it() -> None:
    names = [step.name for step in STEPS]
    for kind in (Frontier, Search):
        assert {*kind.needs} <= {*names[: names.index(kind.name)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeats": 5}, "frontier: repeats must be at least 6"),
        ({"items": 0}, "frontier: items must be at least 1"),
        ({"draws": -1}, "frontier: draws must be at least 0"),
        ({"deepest": 1.0}, "deepest must lie between 0 and 1"),
    ],
)
def test_options_out_of_range(
    llama: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        replace(STEP, **change).run(started(llama, tmp_path))


def test_a_setting_that_the_edge_refuses_is_named(
    llama: Path, tmp_path: Path, told: type[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(self: FakeEngine, routing: Mapping[str, Any]) -> RoutingPolicy:
        if "exit" in routing.get("depth", {}):
            raise RoutingError("not today", param="routing.depth.exit", reason="invalid_field")
        return RoutingPolicy(SkipSet.of(blocks=(1,), phase=Phase.DECODE))

    monkeypatch.setattr(FakeEngine, "resolve", refusing)
    with pytest.raises(CalibrationError, match=r"setting 'exit .*: routing.depth.exit: not to"):
        STEP.run(invented(llama, tmp_path))
