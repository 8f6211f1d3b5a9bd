"""Importance and layer metrics against transformers in fp64, one text and one token at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.calibration import (
    calibration_of,
    drawn_prompts,
    make_biased,
    one_text_at_a_time,
    plain_model,
)
from support.tiny import FAMILIES, LAYERS, make_model
from torch import Tensor

from sluice.models.offline.calibrate.depth import importance as effects
from sluice.models.offline.calibrate.depth.importance import Importance, drawn_places
from sluice.models.offline.calibrate.depth.order_evidence import order_evidence
from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.samples import Sample
from sluice.models.profile.layer_fields import ImportanceEvidence, ImportanceFields, LayerMetrics

STEP = Importance(future_prompts=3, future_positions=2)


@dataclass
class Added:
    """What attention and MLP of each layer add to the stream, and the embeddings; one text."""

    start: Tensor
    attention: list[Tensor]
    mlp: list[Tensor]

    @property
    def whole(self) -> list[Tensor]:
        return [a + m for a, m in zip(self.attention, self.mlp, strict=True)]


@contextmanager
def left_out(model: Any, layer: int | None, last: int) -> Iterator[None]:
    """The layer gives what it got at tokens 1 to `last`."""

    def hook(_module: Any, arguments: Any, output: Any) -> Any:
        given = (output[0] if isinstance(output, tuple) else output).clone()
        for token in range(1, last + 1):
            given[0, token] = arguments[0][0, token]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    blocks = [] if layer is None else [model.model.layers[layer]]
    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def added(model: Any, ids: list[int], layer: int | None = None, last: int = 0) -> Added:
    """Run one text, perhaps with a layer left out of some tokens."""
    start: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {"self_attn": [], "mlp": []}

    def keep(place: list[Tensor]) -> Any:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            place.append((output[0] if isinstance(output, tuple) else output)[0])

        return hook

    handles = [model.model.embed_tokens.register_forward_hook(lambda *a: start.append(a[2][0]))]
    for block in model.model.layers:
        for name, place in parts.items():
            handles.append(getattr(block, name).register_forward_hook(keep(place)))
    try:
        with left_out(model, layer, last):
            model(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Added(start[0], parts["self_attn"], [part.view_as(start[0]) for part in parts["mlp"]])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def relative(a: Tensor, b: Tensor) -> float:
    return float((b - a).norm() / a.norm())


def expected(model: Any, texts: list[list[int]]) -> dict[str, Any]:
    """Means over all tokens of all texts, in Python's floats."""
    sums: dict[str, list[list[float]]] = {}
    for ids in texts:
        run = added(model, ids)
        for token in range(len(ids)):
            stream = run.start[token]
            for layer in range(LAYERS):
                middle = stream + run.attention[layer][token]
                after = middle + run.mlp[layer][token]
                values = {
                    "block": 1 - cosine(stream, after),
                    "attention": 1 - cosine(stream, middle),
                    "mlp": 1 - cosine(middle, after),
                    "block added": relative(stream, after),
                    "attention added": relative(stream, middle),
                    "mlp added": relative(middle, after),
                    "turn": cosine(after - stream, stream),
                    "lim": -cosine(stream, after),
                }
                for name, value in values.items():
                    sums.setdefault(name, [[] for _ in range(LAYERS)])[layer].append(value)
                stream = after
    return {name: [float(np.mean(each)) for each in layers] for name, layers in sums.items()}


def expected_effect(model: Any, places: list[tuple[list[int], int]]) -> list[float]:
    most = [0.0] * LAYERS
    for ids, last in places:
        full = added(model, ids).whole
        for layer in range(LAYERS):
            changed = added(model, ids, layer, last).whole
            for later in range(layer + 1, LAYERS):
                for token in range(last + 1, len(ids)):
                    change = relative(full[later][token], changed[later][token])
                    most[layer] = max(most[layer], change)
    return most


def whole(sample: Sample) -> list[int]:
    return [*sample.prompt, *sample.answer]


def fields_of(calibration: Calibration) -> tuple[dict[str, Any], dict[str, Any]]:
    part = STEP.run(calibration)
    ImportanceFields.model_validate(part.fields["importance"])
    LayerMetrics.model_validate(part.fields["layer_metrics"])
    return part.fields["importance"], part.fields["layer_metrics"]


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_plain_transformers(
    family: str, models_folder: Path, tmp_path: Path
) -> None:
    folder = make_biased(family, models_folder / f"importance-{family}")
    calibration = calibration_of(folder, drawn_prompts(6, seed=1), tmp_path, new_tokens=4)
    importance, metrics = fields_of(calibration)
    model = plain_model(folder, torch.float64)
    texts = [whole(sample) for sample in calibration.samples]
    assert len({len(text) for text in texts}) > 3, "padding is tried"
    want = expected(model, texts)
    near = {name: pytest.approx(values, abs=1e-4, rel=1e-4) for name, values in want.items()}
    for name in ("block", "attention", "mlp"):
        assert importance[name] == near[name], name
        assert metrics["contribution"][name] == near[f"{name} added"], name
        assert max(importance[name]) > 0.01
    assert metrics["turn"] == near["turn"]
    assert metrics["lim"] == near["lim"]
    drawn = drawn_places(calibration.samples, 3, 2, calibration.seed)
    effect = expected_effect(model, [(whole(sample), last) for sample, last in drawn])
    assert metrics["future_effect"] == pytest.approx(effect, abs=1e-4, rel=1e-4)
    assert min(metrics["future_effect"][:-1]) > 0.01
    assert metrics["future_effect"][-1] == 0.0


def test_its_evidence_is_what_each_prompt_says(models_folder: Path, tmp_path: Path) -> None:
    """A prompt that is there twice is one prompt; intervals are those of each prompt's sums."""
    folder = make_biased("llama", models_folder / "importance-llama")
    prompts = drawn_prompts(9, seed=1)
    calibration = calibration_of(folder, [*prompts, prompts[0]], tmp_path, new_tokens=4)
    found = STEP.run(calibration).fields
    evidence = ImportanceEvidence.model_validate(found["importance_evidence"])
    assert evidence.prompts == 9
    model = plain_model(folder, torch.float64)
    texts = [whole(sample) for sample in calibration.samples[:9]]
    tokens = np.array([len(text) * (1 + (text is texts[0])) for text in texts])
    for name in ("block", "attention", "mlp"):
        unit = getattr(evidence, name)
        sums = np.array([expected(model, [text])[name] for text in texts]) * tokens[:, None]
        want = order_evidence({name: found["importance"][name]}, sums[..., None], tokens)
        assert np.allclose(unit.intervals, getattr(want, name).intervals, atol=1e-4)
        values = found["importance"][name]
        assert [values[layer] for layer in unit.order] == sorted(values)
        for (low, high), value in zip(unit.intervals, values, strict=True):
            assert low < value < high


def test_few_prompts_say_that_they_show_no_order(
    models_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_biased("llama", models_folder / "importance-llama")
    with caplog.at_level(logging.WARNING):
        found = STEP.run(calibration_of(folder, [[1, 2, 3]] * 20, tmp_path)).fields
    evidence = ImportanceEvidence.model_validate(found["importance_evidence"])
    assert (evidence.block, evidence.attention, evidence.mlp) == (None, None, None)
    (note,) = evidence.notes
    assert note == "1 different prompts do not show how sure the order of layers is: it takes 8"
    assert f"importance: {note}" in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen2_moe", "deepseek_v3"])
def test_outliers_are_those_of_numpy(family: str, models_folder: Path, tmp_path: Path) -> None:
    folder = make_biased(family, models_folder / f"importance-{family}")
    _, metrics = fields_of(calibration_of(folder, [[1, 2, 3]], tmp_path, new_tokens=2))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights = np.concatenate(
            [
                tensor.astype(np.float64).ravel()
                for name, tensor in tensors.items()
                if name.startswith(prefix) and tensor.ndim > 1 and not name.endswith("bias")
            ]
        )
        share = float((((weights - weights.mean()) / weights.std()) > 1).mean())
        assert metrics["zd"][layer] == pytest.approx(share, abs=1e-6)
        assert 0.01 < share < 0.5


def test_texts_side_by_side_do_not_matter_to_each_other(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("gpt_oss", models_folder / "importance-alone")
    prompts = drawn_prompts(7, seed=2, high=40)
    together = fields_of(calibration_of(folder, prompts, tmp_path / "together"))
    one_text_at_a_time(monkeypatch)
    alone = fields_of(calibration_of(folder, prompts, tmp_path / "alone"))
    for mine, theirs in zip(together, alone, strict=True):
        for name, values in mine.items():
            if isinstance(values, dict):
                for part, numbers in values.items():
                    assert numbers == pytest.approx(theirs[name][part], abs=1e-6), name
            else:
                assert values == pytest.approx(theirs[name], abs=1e-6), name


def test_layers_that_do_not_fit_a_pass_together_give_the_same(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("qwen3", models_folder / "importance-rows")
    calibration = calibration_of(folder, drawn_prompts(1), tmp_path)
    sample = calibration.samples[0]
    last = len(sample.prompt) - 1
    want = effects.future_effect(calibration.model, sample, last)
    for rows in (1, 2, 3, 5):
        monkeypatch.setattr(effects, "BATCH_TOKENS", rows * len(whole(sample)))
        got = effects.future_effect(calibration.model, sample, last)
        assert got.tolist() == pytest.approx(want.tolist(), rel=1e-5), rows


def test_places_are_drawn_by_seed_and_leave_first_and_last_token() -> None:
    lengths = (2, 3, 4, 9, 30)
    samples = [Sample(tuple(range(length - 1)), (0,)) for length in lengths]
    drawn = drawn_places(samples, 10, 4, 0)
    counts = {len(whole(sample)): 0 for sample, _ in drawn}
    for sample, last in drawn:
        assert 1 <= last <= len(whole(sample)) - 2
        counts[len(whole(sample))] += 1
    assert counts == {3: 1, 4: 2, 9: 4, 30: 4}
    assert drawn_places(samples, 10, 4, 0) == drawn
    assert drawn_places(samples, 10, 4, 1) != drawn
    assert len(drawn_places(samples, 2, 1, 0)) == 2


def test_texts_of_two_tokens_are_refused(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("llama", models_folder / "importance-short")
    with pytest.raises(CalibrationError, match="no prompt has 3 tokens with its answer"):
        STEP.run(calibration_of(folder, [[5], [6]], tmp_path, new_tokens=1))


@pytest.mark.parametrize("name", ["future_prompts", "future_positions"])
def test_options_below_one_are_refused(name: str, models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("llama", models_folder / "importance-short")
    with pytest.raises(CalibrationError, match=f"importance: {name}: must be at least 1"):
        Importance(**{name: 0}).run(calibration_of(folder, [[1, 2]], tmp_path))


def test_a_stream_that_is_not_finite_is_refused(models_folder: Path, tmp_path: Path) -> None:
    folder = make_model("llama", models_folder / "importance-broken")
    calibration = calibration_of(folder, [[1, 2, 3]], tmp_path)
    assert calibration.samples
    calibration.model.blocks[2].get_submodule("mlp.down_proj").weight.fill_(float("inf"))
    with pytest.raises(CalibrationError, match="layer 2: the residual stream is not finite"):
        STEP.run(calibration)
