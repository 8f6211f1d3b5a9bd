"""Skip ratios against medians of the router's scores by hand, and against the control's meaning."""

from __future__ import annotations

from collections.abc import Callable
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
from support.references.routes import Asked, cut
from support.tiny import LAYERS, make_model

from sluice.models.offline.calibrate.experts.skip_ratios import SkipRatios
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.examples import CalibrationError

Look = Callable[[int, list[float], list[int]], None]
"""Told layer, scores of all experts and selected experts of each token."""


def each_token(model: Any, texts: list[list[int]], look: Look) -> None:
    """Run texts one by one; scores by hand from the router's weights in fp64."""

    def hook(layer: int, router: Any) -> Any:
        def after(_module: Any, arguments: Any, output: Any) -> None:
            states = arguments[0].reshape(-1, arguments[0].shape[-1])
            for state, ids in zip(states, output[2].tolist(), strict=True):
                logits = router.weight.double() @ state.double()
                if getattr(router, "bias", None) is not None:
                    logits = logits + router.bias.double()
                if model.config.model_type == "deepseek_v3":
                    scores = 1 / (1 + torch.exp(-logits))
                else:
                    scores = torch.exp(logits) / torch.exp(logits).sum()
                look(layer, scores.tolist(), ids)

        return after

    for layer, block in enumerate(model.model.layers):
        router = getattr(block.mlp, "gate", None) or getattr(block.mlp, "router", None)
        if router is not None:
            router.register_forward_hook(hook(layer, router))
    for ids in texts:
        model(input_ids=torch.tensor([ids]), use_cache=False)


def texts_of(calibration: Calibration) -> list[list[int]]:
    return [[*sample.prompt, *sample.answer] for sample in calibration.samples]


def run(calibration: Calibration) -> list[float]:
    ratios: list[float] = SkipRatios().run(calibration).fields["skip_ratios"]
    assert len(ratios) == LAYERS
    assert all(0 <= ratio <= 1 for ratio in ratios)
    return ratios


@pytest.mark.parametrize(
    ("family", "top_k"), [*((family, None) for family in MOE_FAMILIES), ("olmoe", 5)]
)
def test_ratios_are_medians_of_the_routers_scores(
    family: str, top_k: int | None, models_folder: Path, tmp_path: Path
) -> None:
    changes = {} if top_k is None else {"num_experts_per_tok": top_k}
    folder = make_biased(family, models_folder / f"ratios-{family}-{top_k}", **changes)
    calibration = calibration_of(folder, drawn_prompts(6, seed=1), tmp_path, new_tokens=5)
    ratios = run(calibration)
    found: dict[int, list[float]] = {}
    # In one number a token: (scores selected, the share of the best that the others have).
    routed: dict[int, list[tuple[list[float], list[int]]]] = {}

    def look(layer: int, scores: list[float], ids: list[int]) -> None:
        held = sorted((scores[expert] for expert in ids), reverse=True)
        found.setdefault(layer, []).extend(score / held[0] for score in held[1:])
        routed.setdefault(layer, []).append((scores, ids))

    each_token(plain_model(folder, torch.float64), texts_of(calibration), look)
    for layer in range(LAYERS):
        want = float(np.median(found[layer])) if layer in found else 0.0
        assert ratios[layer] == pytest.approx(want, abs=1e-4), layer
    assert any(0.01 < ratio < 0.99 for ratio in ratios)

    # As the control applies it, half of the selections but the best are dropped.
    for layer, tokens in routed.items():
        asked = Asked(skip_ratio=ratios[layer])
        kept = sum(len(cut(ids, scores, asked)[0]) - 1 for scores, ids in tokens)
        others = len(found[layer])
        near = sum(abs(ratio - ratios[layer]) < 1e-4 for ratio in found[layer])
        assert abs(others - 2 * kept) <= 1 + 2 * near, layer


def test_layers_without_experts_have_none(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("qwen3_moe", models_folder / "ratios-dense-layer")
    ratios = run(calibration_of(folder, drawn_prompts(3), tmp_path))
    assert ratios[1] == 0.0
    assert all(ratio > 0 for layer, ratio in enumerate(ratios) if layer != 1)


def test_texts_side_by_side_do_not_matter_to_each_other(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("mixtral", models_folder / "ratios-alone")
    prompts = drawn_prompts(7, seed=2, high=40)
    together = run(calibration_of(folder, prompts, tmp_path / "together"))
    one_text_at_a_time(monkeypatch)
    alone = run(calibration_of(folder, prompts, tmp_path / "alone"))
    assert together == pytest.approx(alone, abs=2e-5)


def test_one_expert_per_token_is_refused(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("olmoe", models_folder / "ratios-one", num_experts_per_tok=1)
    calibration = calibration_of(folder, [[1, 2]], tmp_path)
    assert SkipRatios().refusal(calibration) == "the model runs one expert per token"
    with pytest.raises(CalibrationError, match="the model runs one expert per token"):
        run(calibration)


def test_a_dense_model_is_refused(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("llama", models_folder / "ratios-dense")
    calibration = calibration_of(folder, [[1, 2]], tmp_path)
    assert SkipRatios().refusal(calibration) == "llama has no mixture-of-experts layers"
    with pytest.raises(CalibrationError, match="llama has no mixture-of-experts layers"):
        run(calibration)


def test_a_model_of_dense_layers_in_a_family_with_experts_is_refused(
    models_folder: Path, tmp_path: Path
) -> None:
    """Before anything runs: a whole calibration leaves the step out."""
    dense = [*range(LAYERS)]
    folder = make_model("qwen3_moe", models_folder / "ratios-all-dense", mlp_only_layers=dense)
    calibration = calibration_of(folder, [[1, 2]], tmp_path)
    assert SkipRatios().refusal(calibration) == "none of the model's layers has experts"
