"""Forced generation: what an engine says of given tokens, against transformers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.calibration import calibration_of, drawn_prompts
from support.tiny import make_model

from sluice.models.depth.registry import exit_method
from sluice.models.offline.calibrate.depth.exit_simulation import ExitSetting, left
from sluice.models.offline.calibrate.pipeline import engine_of
from sluice.models.offline.forced import Text, divergence, read_forced
from sluice.models.offline.hf_model.hooks import ablated, final_states
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.offline.hf_model.samples import Sample, SampleBatch
from sluice.models.policy.policy import ExitRule, Phase, RoutingPolicy, SkipSet

PROMPTS = drawn_prompts(7, seed=3)
TOKENS = drawn_prompts(7, seed=5, low=2, high=9)
"""Not what the model would say."""
SKIP = SkipSet.of(blocks=(2,), attention=(4,), phase=Phase.DECODE)
EXIT = ExitRule("confidence", (2, 4), threshold=0.02)


@torch.no_grad()
def expected(model: HFModel, skip: SkipSet) -> list[torch.Tensor]:
    """Log probabilities at each token of each text, (tokens, vocabulary)."""
    found = []
    for prompt, tokens in zip(PROMPTS, TOKENS, strict=True):
        batch = SampleBatch.of([Sample(tuple(prompt), tuple(tokens))])
        with ablated(model, skip, batch.generated):
            states = final_states(model, batch).flatten(0, 1)[batch.where]
        found.append(model.logits(states).log_softmax(-1))
    return found


def test_tokens_are_judged_as_transformers_does(models_folder: Path, tmp_path: Path) -> None:
    calibration = calibration_of(make_model("llama", models_folder / "forced"), PROMPTS, tmp_path)
    model = calibration.model
    full, skipped = expected(model, SkipSet()), expected(model, SKIP)
    texts = [Text(p, t) for p, t in zip(PROMPTS, TOKENS, strict=True)]
    exits = []
    for text in texts:
        batch = SampleBatch.of([Sample(tuple(text.prompt), tuple(text.tokens))])
        exits.append(left(model, batch, ExitSetting(exit_method("confidence"), {}, 0.02, (2, 4))))
    with engine_of(calibration, 40, 3) as engine:
        stock, records = read_forced(engine, texts, RoutingPolicy(), 3, top=8)
        assert len(records) == len(texts)
        against = [Text(t.prompt, t.tokens, own.top) for t, own in zip(texts, stock, strict=True)]
        read, _ = read_forced(engine, against, RoutingPolicy(SKIP), 2)
        again, _ = read_forced(engine, against, RoutingPolicy(), 2)
        under_exit, left_early = read_forced(engine, texts, RoutingPolicy(exit=EXIT), 3)
        # The engine generates freely again.
        limits = [len(t) for t in TOKENS]
        free = engine.answers(PROMPTS, None, limits, (), 3).tokens
    assert [*free] != [tuple(t) for t in TOKENS]
    for n, tokens in enumerate(TOKENS):
        given = torch.tensor(tokens)[:, None]
        for own, wanted in ((stock[n], full[n]), (read[n], skipped[n])):
            torch.testing.assert_close(
                own.log_probs, wanted.gather(-1, given)[:, 0], atol=1e-4, rtol=1e-4
            )
            assert torch.equal(own.likeliest, wanted.argmax(-1))
        torch.testing.assert_close(
            stock[n].top.log_probs, full[n].topk(8).values, atol=1e-4, rtol=0
        )
        ids = stock[n].top.ids
        rest = [each.gather(-1, ids).exp() for each in (full[n], skipped[n])]
        parts = [torch.cat([each, 1 - each.sum(-1, keepdim=True)], -1) for each in rest]
        kl = (parts[0] * (parts[0] / parts[1]).log()).sum(-1)
        torch.testing.assert_close(read[n].divergence, kl, atol=1e-4, rtol=1e-3)
        whole = (full[n].exp() * (full[n] - skipped[n])).sum(-1)
        assert (read[n].divergence <= whole + 1e-5).all()
        assert float(again[n].divergence.max()) < 1e-6
        # The first token comes from the prompt, on which nothing acts.
        assert float(read[n].divergence[0]) < 1e-6
        assert torch.equal(under_exit[n].likeliest[1:], exits[n].tokens)
    assert max(float(own.divergence.max()) for own in read) > 1e-4
    assert any(record.exits[2] for record in left_early)


def test_divergence_of_tokens_and_a_rest() -> None:
    p, q = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    wanted = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert divergence(p, q) == pytest.approx(wanted)
    assert divergence(p, p) == 0.0
    certain = torch.tensor([1.0]).log()
    assert divergence(certain, certain) == pytest.approx(0.0, abs=1e-9)
