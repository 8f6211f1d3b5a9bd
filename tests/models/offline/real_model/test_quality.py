"""What policies cost, on the demo model, whose full depth and skips are well apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.platforms.cpu import CpuPlatform

from sluice.models.offline.demo import DEMO_MODEL_DIR
from sluice.models.offline.demo.tasks.tasks import distinct
from sluice.models.offline.hf_model.examples import Example
from sluice.models.offline.real_model.quality import Questions, measure_all, paired, token_share


def test_a_difference_is_paired() -> None:
    full = [True] * 30 + [False] * 30
    same = paired(full, full)
    assert (same["value"], same["items"]) == (0.5, 60)
    # Sixty equal answers do not say that no answer would differ: 1.96 * sqrt(2 / 62 / 62).
    assert same["difference"]["value"] == 0.0
    bounds = (same["difference"]["low"], same["difference"]["high"])
    assert bounds == pytest.approx((-0.0447, 0.0447), abs=1e-4)
    # Three items lost of sixty: less sure than the share's own interval is wide.
    lost = paired([False] * 3 + full[3:], full)["difference"]
    assert lost["value"] == pytest.approx(-0.05)
    # Of Bonett and Price: one item more on each side, so 1 and 4 of 62.
    assert (lost["low"], lost["high"]) == pytest.approx((-0.1180, 0.0213), abs=1e-3)


def test_tokens_of_one_text_are_one_sample() -> None:
    share = token_share([30, 30, 0, 30], [30, 30, 30, 30])
    assert share.value == 0.75
    assert share.low == 0.0
    assert share.high == 1.0
    sure = token_share([29, 31, 30, 30] * 10, [40] * 40)
    assert sure.low > 0.74


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo model in fp32."""
    monkeypatch.setattr(CpuPlatform, "supported_dtypes", [torch.float32])
    folder = tmp_path / "demo"
    shutil.copytree(DEMO_MODEL_DIR, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


POLICIES: dict[str, dict[str, Any]] = {
    "half": {"depth": {"skip": {"blocks": [2, 3, 4, 5]}}},
    "half, answers only": {"depth": {"skip": {"blocks": [2, 3, 4, 5]}, "phase": "decode"}},
    "never": {"depth": {"exit": {"method": "confidence", "threshold": 1.0, "layers": [0]}}},
    "at once": {"depth": {"exit": {"method": "confidence", "threshold": 0.0, "layers": [0]}}},
}


def test_policies_beside_full_depth(model: Path) -> None:
    items = distinct("sort", "heldout", 5, 32)
    texts = [f"<|user|>{item.prompt}<|assistant|>" for item in items]
    answers = tuple(
        Example(text=text, answer=item.answer, task="answers")
        for text, item in zip(texts, items, strict=True)
    )
    choices = tuple(
        example.model_copy(update={"choices": (example.answer, "9 9 9"), "task": "choices"})
        for example in answers
    )
    chats = tuple(Example(prompt=item.prompt) for item in items)
    found = measure_all(str(model), Questions(choices, answers, chats), POLICIES, None)
    found = json.loads(json.dumps(found))
    assert found["tasks"] == {"choices": 32, "answers": 32, "all": 32}
    assert found["noise"]["read"]["value"] == 1.0
    assert found["noise"]["generated"]["value"] == 1.0
    full, half, decode, never, at_once = found["policies"].values()
    assert full["answers"]["value"] > 0.9
    assert full["choices"]["value"] == 1.0
    assert full["compute_fraction"] == 1.0
    for broken in (half, decode, at_once):
        assert broken["answers"]["difference"]["high"] < 0
        assert broken["agreement"]["high"] < 1
    assert half["choices"]["items"] == 32
    assert half["compute_fraction"] == pytest.approx(0.5, abs=0.01)
    for generating in (decode, never, at_once):
        assert generating["choices"] is None
    assert never["answers"]["difference"]["value"] == 0
    assert never["agreement"]["value"] == 1.0
    assert at_once["mean_layers"] == 1.0
