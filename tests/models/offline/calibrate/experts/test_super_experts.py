"""Super experts against each expert's output by hand, one text and one token at a time."""

from __future__ import annotations

from collections import Counter
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
from support.tiny import LAYERS, make_model
from torch import Tensor

from sluice.models.offline.calibrate.experts.super_experts import SuperExperts
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.profile.expert_fields import ExpertMap

EXPERTS = 8


def expert_output(experts: Any, expert: int, state: Tensor) -> Tensor:
    """One expert on one token, before its weight; (hidden,) to (hidden,)."""
    if hasattr(experts, "gate_up_proj_bias"):
        both = state @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        return inner @ experts.down_proj[expert] + experts.down_proj_bias[expert]
    gate, up = (experts.gate_up_proj[expert] @ state).chunk(2)
    return experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)


def expected(model: Any, texts: list[list[int]]) -> tuple[dict[int, list[float]], dict[int, Any]]:
    """Largest outputs and shares of tokens, by layer."""
    maxima: dict[int, list[float]] = {}
    served: dict[int, Counter[int]] = {}

    def hook(layer: int, experts: Any) -> Any:
        def look(_module: Any, arguments: Any, output: Any) -> None:
            states = arguments[0].reshape(-1, arguments[0].shape[-1])
            for state, ids in zip(states, output[2].tolist(), strict=True):
                for expert in ids:
                    most = float(expert_output(experts, expert, state).abs().max())
                    row = maxima.setdefault(layer, [0.0] * EXPERTS)
                    row[expert] = max(row[expert], most)
                    served.setdefault(layer, Counter())[expert] += 1

        return look

    for layer, block in enumerate(model.model.layers):
        router = getattr(block.mlp, "gate", None) or getattr(block.mlp, "router", None)
        if router is not None:
            router.register_forward_hook(hook(layer, block.mlp.experts))
    for ids in texts:
        model(input_ids=torch.tensor([ids]), use_cache=False)
    tokens = sum(map(len, texts))
    load = {
        layer: [counts[expert] / tokens for expert in range(EXPERTS)]
        for layer, counts in served.items()
    }
    return maxima, load


def run(calibration: Calibration, step: SuperExperts | None = None) -> tuple[list[Any], ExpertMap]:
    fields = (step or SuperExperts()).run(calibration).fields
    return fields["super_experts"], ExpertMap.model_validate(fields["expert_map"])


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_numbers_are_those_of_plain_transformers(
    family: str, models_folder: Path, tmp_path: Path
) -> None:
    folder = make_biased(family, models_folder / f"supers-{family}")
    calibration = calibration_of(folder, drawn_prompts(6, seed=1), tmp_path, new_tokens=4)
    supers, found = run(calibration)
    texts = [[*sample.prompt, *sample.answer] for sample in calibration.samples]
    maxima, load = expected(plain_model(folder, torch.float64), texts)
    assert found.layers == tuple(sorted(maxima))
    for layer, row, share in zip(found.layers, found.maxima, found.load, strict=True):
        assert row == pytest.approx(maxima[layer], rel=1e-4, abs=1e-4)
        assert share == pytest.approx(load[layer], abs=1e-9)
    early = {layer: row for layer, row in maxima.items() if layer < round(0.75 * LAYERS)}
    entries = np.array(list(early.values()))
    least = max(np.percentile(entries, 99.5), entries.max() / 10)
    assert supers == [
        [layer, expert]
        for layer, row in sorted(early.items())
        for expert in range(EXPERTS)
        if row[expert] > least
    ]


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "deepseek_v3"])
def test_a_planted_expert_is_found(family: str, models_folder: Path, tmp_path: Path) -> None:
    """In an early layer; one in the last layer only where that layer counts."""
    folder = make_model(family, models_folder / f"planted-{family}")
    calibration = calibration_of(folder, drawn_prompts(6, seed=1), tmp_path)
    _, before = run(calibration)
    loads = dict(zip(before.layers, before.load, strict=True))
    # Experts that are selected, and not by every token.
    early, late = (int(np.argmax(loads[layer])) for layer in (2, LAYERS - 1))
    for layer, expert in ((2, early), (LAYERS - 1, late)):
        calibration.model.blocks[layer].mlp.experts.down_proj[expert] *= 1000.0
    assert run(calibration)[0] == [[2, early]]
    everywhere, found = run(calibration, SuperExperts(depth=1.0, percentile=90.0))
    assert [2, early] in everywhere
    assert [LAYERS - 1, late] in everywhere
    assert max(found.maxima[found.layers.index(2)]) > 20 * max(before.maxima[1])


def test_a_massive_activation_counts_where_it_forms(models_folder: Path, tmp_path: Path) -> None:
    """One expert adds a huge element, and all experts of a later layer take half of it away."""
    folder = make_model("gpt_oss", models_folder / "planted-massive")
    calibration = calibration_of(folder, drawn_prompts(6, seed=1), tmp_path)
    paper = SuperExperts(criterion="paper", percentile=0.0)
    supers, before = run(calibration, paper)
    assert supers == []
    assert len(run(calibration)[0]) == 1, "the other criterion always finds one"
    expert = int(np.argmax(before.load[1]))
    blocks = calibration.model.blocks
    blocks[1].mlp.experts.down_proj_bias[expert, 0] = 1e6
    blocks[4].mlp.experts.down_proj_bias[:, 0] = -5e5
    supers, found = run(calibration, paper)
    assert supers == [[1, expert]]
    assert max(found.maxima[4]) > 4e5, "and as large as that one's, but not where it forms"
    # A stream as large all over is not massive.
    blocks[1].mlp.experts.down_proj_bias[expert] = 1e6
    blocks[4].mlp.experts.down_proj_bias[:] = -5e5
    assert run(calibration, paper)[0] == []


def test_each_part_of_the_criterion_counts() -> None:
    maxima = {
        0: [1.0, 2.0, 40.0, 3.0],
        1: [500.0, 1.0, 49.0, 51.0],
        3: [9000.0, 1.0, 1.0, 1.0],
    }
    early = {layer: maxima[layer] for layer in (0, 1)}

    def chosen(layers: set[int], of: dict[int, Any], **options: float) -> list[tuple[int, int]]:
        return list(SuperExperts(**options).chosen(maxima, layers, of))

    assert chosen({0, 1}, early, percentile=0.0) == [(1, 0), (1, 3)]
    assert chosen({0, 1}, early, percentile=0.0, share=0.0979) == [(1, 0), (1, 2), (1, 3)]
    assert chosen({0, 1}, early) == [(1, 0)]
    assert chosen({0, 1}, early, percentile=80.0, share=0.0) == [(1, 0), (1, 3)]
    assert chosen({0}, early, percentile=0.0) == []
    assert chosen({0, 1, 3}, maxima, percentile=0.0) == [(3, 0)]
    assert chosen({0, 1}, maxima, percentile=0.0) == []
    assert chosen({0, 1}, maxima, percentile=0.0, share=0.05) == [(1, 0)]
    assert chosen(set(), {}) == []


def test_texts_side_by_side_do_not_matter_to_each_other(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("qwen2_moe", models_folder / "supers-alone")
    prompts = drawn_prompts(7, seed=2, high=40)
    supers, together = run(calibration_of(folder, prompts, tmp_path / "together"))
    one_text_at_a_time(monkeypatch)
    supers_alone, alone = run(calibration_of(folder, prompts, tmp_path / "alone"))
    assert supers == supers_alone
    assert together.load == alone.load
    for mine, theirs in zip(together.maxima, alone.maxima, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


def test_looking_does_not_change_the_model(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("gpt_oss", models_folder / "supers-same")
    calibration = calibration_of(folder, [[1, 2, 3, 4]], tmp_path)
    ids = torch.tensor([[1, 2, 3, 4]])
    before = calibration.model.causal_lm(input_ids=ids).logits
    run(calibration)
    assert torch.equal(calibration.model.causal_lm(input_ids=ids).logits, before)


@pytest.mark.parametrize("options", [{"percentile": 101.0}, {"share": -0.1}, {"depth": 1.5}])
def test_options_out_of_range_are_refused(
    options: dict[str, float], models_folder: Path, tmp_path: Path
) -> None:
    folder = make_model("mixtral", models_folder / "supers-options")
    name = next(iter(options))
    with pytest.raises(CalibrationError, match=f"super-experts: {name}: must be in 0 to"):
        run(calibration_of(folder, [[1, 2]], tmp_path), SuperExperts(**options))


def test_an_unknown_criterion_is_refused(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("mixtral", models_folder / "supers-options")
    message = "super-experts: criterion: must be code or paper, not 'both'"
    with pytest.raises(CalibrationError, match=message):
        run(calibration_of(folder, [[1, 2]], tmp_path), SuperExperts(criterion="both"))


def test_a_dense_model_is_refused(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("llama", models_folder / "supers-dense")
    calibration = calibration_of(folder, [[1, 2]], tmp_path)
    assert SuperExperts().refusal(calibration) == "llama has no mixture-of-experts layers"
    with pytest.raises(CalibrationError, match="llama has no mixture-of-experts layers"):
        run(calibration)


def test_an_output_that_is_not_finite_is_refused(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("mixtral", models_folder / "supers-broken")
    calibration = calibration_of(folder, [[1, 2, 3]], tmp_path)
    assert calibration.samples
    calibration.model.blocks[3].get_submodule("mlp.experts").down_proj.fill_(float("inf"))
    with pytest.raises(CalibrationError, match="layer 3: an expert's output is not finite"):
        run(calibration)
