"""Behaviour experts against plain transformers, one prompt and one token at a time."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind
from support.calibration import (
    MOE_FAMILIES,
    calibration_of,
    make_biased,
    one_text_at_a_time,
    plain_model,
)
from support.tiny import make_model

from sluice.models.offline.calibrate.experts.behaviour import Behaviour
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.profile.expert_fields import BehaviourFields

EXPERTS = 8
WORDS = {"refused": range(4), "answered": range(4, 8), "chatty": range(8, 12), None: range(256)}
"""Tokens that prompts with a label are made of: routers tell such prompts apart."""


def labelled_prompts(*labels: str | None, seed: int = 1) -> list[list[int]]:
    """A prompt of 3 to 12 tokens for each label."""
    rng = random.Random(seed)
    return [[rng.choice(WORDS[label]) for _ in range(rng.randint(3, 12))] for label in labels]


LABELS: list[str | None] = [
    *["refused", None, "answered"] * 9,
    *["chatty", "refused"] * 8,
]
PROMPTS = labelled_prompts(*LABELS)


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


Activations = list[dict[tuple[int, int], float]]


def expected(
    model: Any, activations: Activations, label: str
) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], float]]:
    """Score, and adjusted p-value, of each expert that a labelled prompt activates."""
    sides: tuple[Activations, Activations] = ([], [])
    for found, given in zip(activations, LABELS, strict=True):
        if given is not None:
            sides[given != label].append(found)
    every = sorted({expert for side in sides for run in side for expert in run})
    scores, p_values = {}, {}
    for expert in every:
        one, other = ([run.get(expert, 0.0) for run in side] for side in sides)
        scores[expert] = float(np.mean(one) - np.mean(other))
        test = ttest_ind(one, other, equal_var=False, alternative="greater")
        p_values[expert] = float(test.pvalue)
    # Benjamini and Hochberg; an expert that no prompt activates has p-value 1.
    experts = EXPERTS * sum(has_experts(block) for block in model.model.layers)
    least, adjusted = 1.0, {}
    ordered = sorted(p_values, key=p_values.__getitem__)
    for rank in range(len(ordered), 0, -1):
        least = min(least, p_values[ordered[rank - 1]] * experts / rank)
        adjusted[ordered[rank - 1]] = least
    return scores, adjusted


def has_experts(block: Any) -> bool:
    return hasattr(block.mlp, "experts")


def run(calibration: Calibration, **options: Any) -> dict[str, BehaviourFields]:
    found = Behaviour(**options).run(calibration).fields["behaviours"]
    return {label: BehaviourFields.model_validate(each) for label, each in found.items()}


@pytest.fixture(scope="module")
def mixtral(models_folder: Path) -> Path:
    return make_model("mixtral", models_folder / "behaviour-one")


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_and_scores_are_those_of_plain_transformers(
    family: str, models_folder: Path, tmp_path: Path
) -> None:
    folder = make_biased(family, models_folder / f"behaviour-{family}")
    model = plain_model(folder, torch.float64)
    for measure in ("weight", "count"):
        calibration = calibration_of(folder, PROMPTS, tmp_path, labels=LABELS, new_tokens=3)
        found = run(calibration, measure=measure, experts=1000)
        assert found.keys() == {"refused", "answered", "chatty"}
        activations = [activation(model, ids, measure) for ids in PROMPTS]
        for label, behaviour in found.items():
            scores, p_values = expected(model, activations, label)
            assert behaviour.intervals is not None
            assert behaviour.p_values is not None
            for expert, score, (low, high), p in zip(
                behaviour.experts,
                behaviour.scores,
                behaviour.intervals,
                behaviour.p_values,
                strict=True,
            ):
                assert scores[expert] == pytest.approx(score, rel=1e-4, abs=1e-4)
                assert p_values[expert] == pytest.approx(p, rel=1e-2, abs=1e-6)
                assert 0 < low < score < high
            assert list(behaviour.scores) == sorted(behaviour.scores, reverse=True)
            clear = {e for e, p in p_values.items() if p < 0.0499 and scores[e] > 0.00101}
            assert clear <= {*behaviour.experts}
            assert all(p_values[expert] < 0.0501 for expert in behaviour.experts)
            own = LABELS.count(label)
            assert behaviour.prompts == (own, len(LABELS) - LABELS.count(None) - own)
            assert behaviour.measure == measure
        assert found["answered"].experts
        first = run(calibration, measure=measure, experts=2)["answered"]
        assert first.scores == found["answered"].scores[:2]


def test_a_named_behaviour_is_the_only_one(mixtral: Path, tmp_path: Path) -> None:
    calibration = calibration_of(mixtral, PROMPTS, tmp_path, labels=LABELS)
    every = run(calibration)
    assert run(calibration, label="chatty") == {"chatty": every["chatty"]}


def test_answers_and_neighbours_do_not_count(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = run(calibration_of(mixtral, PROMPTS, tmp_path / "together", labels=LABELS))
    one_text_at_a_time(monkeypatch)
    longer = calibration_of(mixtral, PROMPTS, tmp_path / "alone", labels=LABELS, new_tokens=11)
    alone = run(longer)
    for label, behaviour in together.items():
        other = dict(zip(alone[label].experts, alone[label].scores, strict=True))
        own = dict(zip(behaviour.experts, behaviour.scores, strict=True))
        assert own == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize(
    ("labels", "reason", "named"),
    [
        ([], "no prompt has a label", None),
        (
            ["refused"] * 12,
            "all labelled prompts have the label 'refused': nothing to compare with",
            None,
        ),
        (
            ["refused", "answered"],
            "no label has 8 different prompts with it and as many without: fewer tell nothing",
            "1 different prompts with 'refused' and 1 without tell nothing: it takes 8 of each",
        ),
        (
            ["refused"] * 20 + ["answered"] * 7,
            "no label has 8 different prompts with it and as many without: fewer tell nothing",
            "20 different prompts with 'refused' and 7 without tell nothing: it takes 8 of each",
        ),
    ],
)
def test_prompts_that_show_nothing_are_refused(
    labels: list[str], reason: str, named: str | None, mixtral: Path, tmp_path: Path
) -> None:
    """Left out of a whole calibration; asked for by name, an error."""
    given = [*labels, *[None] * 4]
    calibration = calibration_of(mixtral, labelled_prompts(*given), tmp_path, labels=given)
    assert Behaviour().refusal(calibration) == reason
    for options, message in (({}, reason), ({"label": "refused"}, named or reason)):
        with pytest.raises(CalibrationError, match=f"behaviour: {message}"):
            run(calibration, **options)


def test_a_label_on_too_few_prompts_says_so(
    mixtral: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = ["refused"] * 10 + ["answered"] * 10 + ["chatty"] * 7
    calibration = calibration_of(mixtral, labelled_prompts(*labels), tmp_path, labels=labels)
    with caplog.at_level(logging.WARNING):
        found = run(calibration)
    note = "7 different prompts with 'chatty' and 20 without tell nothing: it takes 8 of each"
    assert (found["chatty"].experts, found["chatty"].note) == ((), note)
    assert note in caplog.text
    assert found["refused"].experts
    assert found["refused"].note is None


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
    """To the last bit, however a batch rounds: the same prompts have either label."""
    prompts = labelled_prompts(*[None] * 12)
    calibration = calibration_of(
        mixtral, [*prompts, *prompts], tmp_path, labels=["a"] * 12 + ["b"] * 12
    )
    for label, behaviour in run(calibration).items():
        assert behaviour.experts == behaviour.scores == ()
        assert behaviour.note == (
            f"no expert is more active with {label!r} than without, as far as 12 prompts with it "
            "and 12 without can show"
        )


def test_a_prompt_that_is_there_twice_counts_once(mixtral: Path, tmp_path: Path) -> None:
    once = run(calibration_of(mixtral, PROMPTS, tmp_path / "once", labels=LABELS))
    twice = calibration_of(mixtral, PROMPTS * 2, tmp_path / "twice", labels=LABELS * 2)
    assert run(twice) == once
    same = calibration_of(mixtral, [[1, 2, 3], [4, 5]] * 8, tmp_path, labels=["a", "b"] * 8)
    assert Behaviour().refusal(same) is not None


def test_labels_drawn_by_lot_are_hardly_ever_a_behaviour(mixtral: Path, tmp_path: Path) -> None:
    """At most one in twenty on average, whatever the number of experts."""
    prompts = labelled_prompts(*[None] * 40)
    behaviours = []
    for seed in range(15):
        labels = ["a"] * 20 + ["b"] * 20
        random.Random(seed).shuffle(labels)
        calibration = calibration_of(mixtral, prompts, tmp_path, labels=labels)
        behaviours += run(calibration, measure="weight" if seed % 2 else "count").values()
    assert len([each for each in behaviours if each.experts]) <= 4


def test_a_dense_model_is_refused(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("llama", models_folder / "behaviour-dense")
    calibration = calibration_of(folder, PROMPTS, tmp_path, labels=LABELS)
    assert Behaviour().refusal(calibration) == "llama has no mixture-of-experts layers"
    with pytest.raises(CalibrationError, match="llama has no mixture-of-experts layers"):
        run(calibration)
