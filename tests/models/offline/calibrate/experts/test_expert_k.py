"""Experts per token against whole blocks with another top-k, and against every choice there is."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import ttest_1samp, ttest_rel
from support.calibration import MOE_FAMILIES, calibration_of, make_biased, plain_model
from support.tiny import LAYERS, make_model
from torch import Tensor

from sluice.models.offline.calibrate.experts import expert_k as module
from sluice.models.offline.calibrate.experts.expert_k import ExpertK, cheapest, divergences
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.examples import CalibrationError, spaced_indices
from sluice.models.offline.hf_model.moe import moe_layers
from sluice.models.offline.intervals import corrected
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.profile.expert_fields import ExpertBudgetLevel
from sluice.models.routing.experts.controls import top_k_rule
from sluice.models.routing.experts.named import ExpertLimits

TOKENS, DRAWS = 40, 2


def whole_block(mlp: Any, states: Tensor, top_k: int) -> Tensor:
    """A block, shared experts and all, whose router selects `top_k`."""
    router = getattr(mlp, "gate", None) or mlp.router
    stock, router.top_k = router.top_k, top_k
    output = mlp(states.unsqueeze(0))
    router.top_k = stock
    return (output[0] if isinstance(output, tuple) else output)[0]


def expected(model: Any, seed: int) -> dict[int, list[float]]:
    """D_l(k) by layer, k from 1."""
    noise = torch.Generator().manual_seed(seed)
    draws = [torch.randn(TOKENS, model.config.hidden_size, generator=noise) for _ in range(DRAWS)]
    found: dict[int, list[float]] = {}
    for layer, block in enumerate(model.model.layers):
        if not hasattr(block.mlp, "experts"):
            continue
        stock = model.config.num_experts_per_tok
        found[layer] = []
        for k in range(1, stock + 1):
            distances = []
            for states in draws:
                states = states.to(model.dtype)
                change = whole_block(block.mlp, states, k) - whole_block(block.mlp, states, stock)
                distances.append(float(change.square().sum().sqrt()))
            found[layer].append(sum(distances) / DRAWS)
    return found


def run(calibration: Calibration, **options: Any) -> list[ExpertBudgetLevel]:
    step = ExpertK(**{"tokens": TOKENS, "draws": DRAWS, **options})
    return [
        ExpertBudgetLevel.model_validate(each) for each in step.run(calibration).fields["expert_k"]
    ]


@pytest.mark.parametrize(
    ("family", "top_k"), [*((family, None) for family in MOE_FAMILIES), ("gpt_oss", 4)]
)
def test_levels_are_the_best_there_are(
    family: str, top_k: int | None, models_folder: Path, tmp_path: Path
) -> None:
    changes = {} if top_k is None else {"num_experts_per_tok": top_k}
    folder = make_biased(family, models_folder / f"k-{family}-{top_k}", **changes)
    calibration = calibration_of(folder, [[1, 2, 3]], tmp_path, seed=4)
    levels = run(calibration)
    model = plain_model(folder, torch.float64)
    table = expected(model, seed=4)
    stock = model.config.num_experts_per_tok
    full = stock * len(table)
    assert [level.budget for level in levels] == [
        budget
        for budget in (round(share * full) for share in (0.875, 0.75, 0.625, 0.5))
        if budget >= len(table)
    ]
    shape = ExpertShape(stock, layers=tuple(table), experts=8)
    for level in levels:
        chosen = [level.top_k[layer] for layer in table]
        assert sum(chosen) == level.budget
        mine = sum(table[layer][k - 1] for layer, k in zip(table, chosen, strict=True))
        assert level.divergence == pytest.approx(mine, rel=1e-4, abs=1e-4)
        least = min(
            sum(table[layer][k - 1] for layer, k in zip(table, ks, strict=True))
            for ks in itertools.product(range(1, stock + 1), repeat=len(table))
            if sum(ks) == level.budget
        )
        assert mine == pytest.approx(least, rel=1e-4)
        dense = {level.top_k[layer] for layer in range(LAYERS) if layer not in table}
        assert dense <= {stock}
        given = top_k_rule([*level.top_k], ExpertLimits(shape, LAYERS, frozenset()))
        assert given in (level.top_k, chosen[0])


@pytest.mark.parametrize("draws", [4, 1])
def test_a_level_says_how_sure_it_is(draws: int, models_folder: Path, tmp_path: Path) -> None:
    """Fresh draws of noise test a list against the even one; one draw tells nothing."""
    folder = make_biased("olmoe", models_folder / "k-sure", num_experts_per_tok=4)
    calibration = calibration_of(folder, [[1, 2, 3]], tmp_path, seed=4)
    levels = run(calibration, draws=draws)
    layers = moe_layers(plain_model(folder))
    noise = torch.Generator().manual_seed(4)
    hidden = calibration.model.hidden
    states = [torch.randn(TOKENS, hidden, generator=noise) for _ in range(2 * draws)]
    table = np.stack([divergences(layer, states) for layer in layers], axis=1)

    def sums(top_k: Sequence[int], part: slice) -> NDArray[np.float64]:
        columns = [table[part, layer, k - 1] for layer, k in enumerate(top_k)]
        return np.sum(columns, axis=0)

    raw = {}
    for level in levels:
        even = [level.budget // LAYERS] * LAYERS
        for layer in spaced_indices(level.budget % LAYERS, LAYERS):
            even[layer] += 1
        if draws == 1:
            assert (level.interval, level.p_value) == (None, None)
            assert level.note == "one draw of noise tells nothing about lists: it takes 2"
            continue
        assert level.interval is not None
        assert level.interval[0] < level.divergence < level.interval[1]
        want = ttest_1samp(sums(level.top_k, slice(draws)), 0.0).confidence_interval(0.95)
        assert level.interval == pytest.approx((want.low, want.high), rel=1e-3)
        if even != list(level.top_k):
            pair = sums(even, slice(draws, None)), sums(level.top_k, slice(draws, None))
            raw[level.budget] = float(ttest_rel(*pair, alternative="greater").pvalue)
        else:
            assert level.p_value is None
    adjusted = dict(zip(raw, corrected([*raw.values()]), strict=True))
    for level in levels:
        if level.budget in adjusted:
            assert level.p_value == pytest.approx(adjusted[level.budget], rel=0.05, abs=1e-4)
            assert level.p_value is not None
            assert (level.note is None) is (level.p_value <= 0.05)


def test_a_list_that_is_not_shown_to_be_better_says_so(
    models_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Layers that are alike: which of them keeps an expert more is chance."""
    rng = np.random.default_rng(0)

    def alike(_layer: Any, draws: Sequence[Tensor]) -> NDArray[np.float64]:
        return np.array([1.0, 0.0]) * rng.normal(5.0, 1.0, (len(draws), 1))

    monkeypatch.setattr(module, "divergences", alike)
    folder = make_model("mixtral", models_folder / "k-alike")
    with caplog.at_level(logging.WARNING):
        (level,) = run(calibration_of(folder, [[1]], tmp_path), shares="0.75", draws=5)
    assert level.p_value is not None
    assert level.p_value > 0.05
    assert level.note == (
        "5 draws of noise do not show that this list changes outputs less than 9 experts spread "
        "evenly"
    )
    assert f"expert-k: budget 9: {level.note}" in caplog.text


def test_the_full_budget_changes_nothing(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("mixtral", models_folder / "k-full")
    (level,) = run(calibration_of(folder, [[1]], tmp_path), shares="1")
    assert (level.budget, level.top_k, level.divergence) == (2 * LAYERS, (2,) * LAYERS, 0.0)


def test_the_seed_draws_the_noise(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("olmoe", models_folder / "k-seed", num_experts_per_tok=4)
    found = [run(calibration_of(folder, [[1]], tmp_path, seed=seed)) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert [level.divergence for level in found[0]] != [level.divergence for level in found[2]]


def test_the_cheapest_is_the_cheapest_of_all() -> None:
    """Random tables, not falling in k, with widths that differ."""
    rng = random.Random(0)
    for _ in range(30):
        widths = [rng.randint(1, 4) for _ in range(rng.randint(1, 5))]
        table = [[rng.random() for _ in range(width)] for width in widths]
        for budget in range(len(table), sum(widths) + 1):
            least = min(
                (sum(row[k - 1] for row, k in zip(table, ks, strict=True)), ks)
                for ks in itertools.product(*(range(1, width + 1) for width in widths))
                if sum(ks) == budget
            )
            chosen, cost = cheapest(table, budget)
            assert chosen == least[1]
            assert cost == pytest.approx(least[0])


def test_budgets_that_round_alike_are_one(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("mixtral", models_folder / "k-alike")
    step = ExpertK(shares="0.5, 0.75,0.76, 1.0")
    calibration = calibration_of(folder, [[1]], tmp_path)
    layers = moe_layers(calibration.model.causal_lm)
    assert step.budgets(layers) == [12, 9, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": "0.4"}, "expert-k: shares: 0.4 of 12 experts per token leaves 5 for 6 layers"),
        ({"shares": "half"}, "expert-k: shares: 'half' is no number"),
        ({"shares": ""}, "expert-k: shares: '' is no number"),
        ({"shares": "1.5"}, r"expert-k: shares: 1.5 is not in \(0, 1\]"),
        ({"shares": "nan"}, r"expert-k: shares: nan is not in \(0, 1\]"),
        ({"tokens": 0}, "expert-k: tokens: must be at least 1"),
        ({"draws": 0}, "expert-k: draws: must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str, models_folder: Path, tmp_path: Path
) -> None:
    folder = make_model("mixtral", models_folder / "k-options")
    with pytest.raises(CalibrationError, match=message):
        run(calibration_of(folder, [[1]], tmp_path), **options)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {}, "llama has no mixture-of-experts layers"),
        ("olmoe", {"num_experts_per_tok": 1}, "the model runs one expert per token"),
    ],
)
def test_models_without_a_choice_are_refused(
    family: str, changes: dict[str, Any], reason: str, models_folder: Path, tmp_path: Path
) -> None:
    folder = make_model(family, models_folder / f"k-refused-{family}", **changes)
    calibration = calibration_of(folder, [[1]], tmp_path)
    assert ExpertK().refusal(calibration) == reason
    with pytest.raises(CalibrationError, match=reason):
        run(calibration)


def test_an_output_that_is_not_finite_is_refused(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("mixtral", models_folder / "k-broken")
    calibration = calibration_of(folder, [[1]], tmp_path)
    calibration.model.blocks[3].get_submodule("mlp.experts").down_proj.fill_(float("inf"))
    with pytest.raises(CalibrationError, match="layer 3: its output on noise is not finite"):
        run(calibration)
