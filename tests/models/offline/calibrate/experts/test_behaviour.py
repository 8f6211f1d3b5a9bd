"""Behaviour experts against plain transformers, one prompt and one token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.calibration import (
    MOE_FAMILIES,
    calibration_of,
    drawn_prompts,
    make_biased,
    one_text_at_a_time,
    plain_model,
)
from support.tiny import make_model

from sluice.models.offline.calibrate.experts.behaviour import Behaviour
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.profile.fields import BehaviourFields

EXPERTS = 8
PROMPTS = drawn_prompts(8, seed=1)
LABELS = ["refused", None, "answered", "refused", "chatty", "answered", "refused", None]


def activation(model: Any, ids: Sequence[int], measure: str) -> dict[tuple[int, int], float]:
    """Mean over a prompt's tokens, by layer and expert."""
    found: dict[tuple[int, int], float] = {}

    def hook(layer: int) -> Any:
        def after(_module: Any, _arguments: Any, output: Any) -> None:
            for weights, experts in zip(output[1].tolist(), output[2].tolist(), strict=True):
                for weight, expert in zip(weights, experts, strict=True):
                    given = weight if measure == "weight" else 1.0
                    found[layer, expert] = found.get((layer, expert), 0.0) + given / len(ids)

        return after

    handles = []
    for layer, block in enumerate(model.model.layers):
        router = getattr(block.mlp, "gate", None) or getattr(block.mlp, "router", None)
        if router is not None:
            handles.append(router.register_forward_hook(hook(layer)))
    model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def expected(model: Any, label: str, measure: str) -> dict[tuple[int, int], float]:
    """Score of each expert that a labelled prompt activates."""
    sides: tuple[list[Any], list[Any]] = ([], [])
    for ids, given in zip(PROMPTS, LABELS, strict=True):
        if given is not None:
            sides[given != label].append(activation(model, ids, measure))
    every = {expert for side in sides for run in side for expert in run}
    with_it, without = (
        {expert: np.mean([run.get(expert, 0.0) for run in side]) for expert in every}
        for side in sides
    )
    return {expert: float(with_it[expert] - without[expert]) for expert in every}


def run(calibration: Calibration, **options: Any) -> dict[str, BehaviourFields]:
    found = Behaviour(**options).run(calibration).fields["behaviours"]
    return {label: BehaviourFields.model_validate(each) for label, each in found.items()}


@pytest.fixture(scope="module")
def mixtral(models_folder: Path) -> Path:
    return make_model("mixtral", models_folder / "behaviour-one")


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_scores_are_those_of_plain_transformers(
    family: str, models_folder: Path, tmp_path: Path
) -> None:
    folder = make_biased(family, models_folder / f"behaviour-{family}")
    model = plain_model(folder, torch.float64)
    for measure in ("weight", "count"):
        calibration = calibration_of(folder, PROMPTS, tmp_path, labels=LABELS, new_tokens=3)
        found = run(calibration, measure=measure, experts=6)
        assert found.keys() == {"refused", "answered", "chatty"}
        for label, behaviour in found.items():
            want = expected(model, label, measure)
            best = sorted(want.values(), reverse=True)[:6]
            assert behaviour.scores == pytest.approx(best, rel=1e-4, abs=1e-4)
            assert len({*behaviour.experts}) == 6
            for expert, score in zip(behaviour.experts, behaviour.scores, strict=True):
                assert want[expert] == pytest.approx(score, rel=1e-4, abs=1e-4)
            own = LABELS.count(label)
            assert behaviour.prompts == (own, len(LABELS) - LABELS.count(None) - own)
            assert behaviour.measure == measure


def test_a_named_behaviour_is_the_only_one(mixtral: Path, tmp_path: Path) -> None:
    calibration = calibration_of(mixtral, PROMPTS, tmp_path, labels=LABELS)
    every = run(calibration)
    assert run(calibration, label="chatty") == {"chatty": every["chatty"]}
    assert len(every["chatty"].experts) == 10


def test_experts_that_the_others_activate_more_are_none(mixtral: Path, tmp_path: Path) -> None:
    calibration = calibration_of(mixtral, PROMPTS, tmp_path, labels=LABELS)
    behaviour = run(calibration, label="refused", experts=1000)["refused"]
    assert 0 < len(behaviour.experts) < 6 * EXPERTS
    assert list(behaviour.scores) == sorted(behaviour.scores, reverse=True)
    assert behaviour.scores[-1] > 0


def test_answers_and_neighbours_do_not_count(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = run(calibration_of(mixtral, PROMPTS, tmp_path / "together", labels=LABELS))
    one_text_at_a_time(monkeypatch)
    longer = calibration_of(mixtral, PROMPTS, tmp_path / "alone", labels=LABELS, new_tokens=11)
    alone = run(longer)
    for label, behaviour in together.items():
        assert behaviour.experts == alone[label].experts
        assert behaviour.scores == pytest.approx(alone[label].scores, abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([None] * 8, "no prompt has a label"),
        (
            ["refused", *[None] * 6, "refused"],
            "all labelled prompts have the label 'refused': nothing to compare with",
        ),
    ],
)
def test_prompts_that_show_nothing_are_refused(
    labels: list[str | None], reason: str, mixtral: Path, tmp_path: Path
) -> None:
    """Left out of a whole calibration; asked for by name, an error."""
    calibration = calibration_of(mixtral, PROMPTS, tmp_path, labels=labels)
    assert Behaviour().refusal(calibration) == reason
    for options in ({}, {"label": "refused"}):
        with pytest.raises(CalibrationError, match=f"behaviour: {reason}"):
            run(calibration, **options)


def test_a_label_that_is_not_there_is_refused(mixtral: Path, tmp_path: Path) -> None:
    calibration = calibration_of(mixtral, PROMPTS, tmp_path, labels=LABELS)
    step = Behaviour(label="rude")
    assert step.refusal(calibration) is None, "an error, not left out"
    message = "behaviour: label: no prompt has 'rude'; they have answered, chatty, refused"
    with pytest.raises(CalibrationError, match=message):
        step.run(calibration)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "sum"}, "behaviour: measure: must be weight or count, not 'sum'"),
        ({"experts": 0}, "behaviour: experts: must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str, mixtral: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=message):
        run(calibration_of(mixtral, PROMPTS, tmp_path, labels=LABELS), **options)


def test_prompts_that_are_alike_tell_no_behaviour(mixtral: Path, tmp_path: Path) -> None:
    calibration = calibration_of(mixtral, [[1, 2, 3]] * 2, tmp_path, labels=["a", "b"])
    with pytest.raises(CalibrationError, match="no expert is more active with 'a' than without"):
        run(calibration)


def test_a_dense_model_is_refused(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("llama", models_folder / "behaviour-dense")
    calibration = calibration_of(folder, PROMPTS, tmp_path, labels=LABELS)
    assert Behaviour().refusal(calibration) == "llama has no mixture-of-experts layers"
    with pytest.raises(CalibrationError, match="llama has no mixture-of-experts layers"):
        run(calibration)
