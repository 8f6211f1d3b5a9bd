"""Learn-then-Test: p-values by their formula, and what the bound is for, by simulation."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from support.calibration import calibration_of, drawn_prompts
from support.tiny import make_model
from torch import Tensor

from sluice.models.offline.calibrate.depth.risk_bound import RiskBound, hoeffding_bentkus
from sluice.models.offline.calibrate.depth.training_data import TrainSplit
from sluice.models.offline.hf_model.samples import Sample


def p_value(wrong: int, tolerance: float, count: int) -> float:
    """Of `wrong` units with a loss of 1 and the others with none, term by term."""
    mean = wrong / count
    tail = sum(
        math.comb(count, k) * tolerance**k * (1 - tolerance) ** (count - k)
        for k in range(wrong + 1)
    )
    hoeffding = 1.0
    if mean < tolerance:
        terms = (1 - mean) * math.log((1 - mean) / (1 - tolerance))
        if wrong:
            terms += mean * math.log(mean / tolerance)
        hoeffding = math.exp(-count * terms)
    return min(1.0, hoeffding, math.e * tail)


def test_p_values_are_those_of_the_formula() -> None:
    for count in (1, 7, 59, 200):
        for wrong in range(0, count + 1, max(1, count // 9)):
            for tolerance in (0.01, 0.05, 0.3, 0.9):
                found = hoeffding_bentkus(wrong / count, tolerance, count)
                assert found == pytest.approx(p_value(wrong, tolerance, count), rel=1e-9), wrong


def test_a_loss_between_whole_numbers_counts_as_the_next_one() -> None:
    # Where Bentkus decides, below 3 of 100 nothing changes down to 2.
    assert p_value(3, 0.05, 100) > p_value(2, 0.05, 100)
    assert hoeffding_bentkus(0.4001, 0.5, 100) == pytest.approx(
        min(p_value(41, 0.5, 100), math.exp(-100 * divergence(0.4001, 0.5)))
    )


def divergence(a: float, b: float) -> float:
    return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))


@pytest.mark.parametrize(("tolerance", "error"), [(0.05, 0.05), (0.02, 0.1), (0.5, 0.01)])
def test_least_is_the_fewest_units_that_show_anything(tolerance: float, error: float) -> None:
    bound = RiskBound(tolerance, error)
    assert bound.shown(torch.zeros(bound.least))
    assert not bound.shown(torch.zeros(bound.least - 1))
    assert not bound.shown(torch.zeros(0))


def test_the_sequence_ends_with_the_first_failure() -> None:
    bound = RiskBound(0.1, 0.1)
    good, bad = torch.zeros(100), torch.ones(100)
    read = []

    def tests(losses: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
        for number, each in enumerate(losses):
            read.append(number)
            yield number, each

    found = bound.last_shown(tests([good, good, bad, good]))
    assert found is not None
    assert found[0] == 1
    assert read == [0, 1, 2]
    assert bound.last_shown(tests([bad, good])) is None
    assert bound.last_shown(tests([])) is None


RISKS = [0.2 * place / 20 for place in range(21)]
"""True risks of settings, in order: up to twice the tolerance of the tests below."""


def simulated(bound: RiskBound, runs: int, tokens: int) -> list[float]:
    """True risk of what each run chooses, the same 300 units for all of its settings."""
    chosen = []
    for seed in range(runs):
        drawn = torch.rand(300, tokens, generator=torch.Generator().manual_seed(seed))
        tests = ((risk, (drawn < risk).double().mean(1)) for risk in RISKS)
        found = bound.last_shown(tests)
        chosen.append(0.0 if found is None else found[0])
    return chosen


def too_often(bound: RiskBound, risks: list[float]) -> bool:
    """Whether more risks exceed the tolerance than the error, and two deviations, let."""
    broken = sum(risk > bound.tolerance + 1e-9 for risk in risks) / len(risks)
    return broken > bound.error + 2 * math.sqrt(bound.error * (1 - bound.error) / len(risks))


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_bound_holds_as_often_as_it_says(tokens: int) -> None:
    bound = RiskBound(0.1, 0.2)
    risks = simulated(bound, 600, tokens)
    assert not too_often(bound, risks)
    # It is worth something: most runs come near the tolerance.
    assert sum(risks) / len(risks) > 0.05


def test_a_bound_that_does_not_hold_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = RiskBound(0.1, 0.2)
    monkeypatch.setattr(
        RiskBound, "shown", lambda self, losses: float(losses.mean()) <= self.tolerance
    )
    assert too_often(bound, simulated(bound, 200, 1))


def test_halves_share_no_prompt(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("split")
    make_model("llama", folder / "model")
    prompts = drawn_prompts(9, seed=4)
    calibration = calibration_of(folder / "model", [*prompts, *prompts[:4]], folder / "work")
    samples = [Sample(tuple(ids), (1, 2)) for ids in [*prompts, *prompts[:4]]]
    samples[8] = Sample(samples[8].prompt, (1,))
    vars(calibration)["samples"] = tuple(samples)

    split = TrainSplit.of(calibration)
    train, held = ({sample.prompt for sample in half} for half in (split.train, split.test))
    assert not train & held
    # All but the one without a decode step, each once.
    assert train | held == {sample.prompt for sample in samples[:8]}
    assert (len(split.train), len(split.test)) == (4, 4)
    assert TrainSplit.of(calibration) == split

    others = []
    for seed in range(1, 6):
        calibration.seed = seed
        others.append({sample.prompt for sample in TrainSplit.of(calibration).train})
    assert any(other != train for other in others)
    random_state = random.getstate()
    TrainSplit.of(calibration)
    assert random.getstate() == random_state
