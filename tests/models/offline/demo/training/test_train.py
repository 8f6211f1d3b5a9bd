"""The training pieces and the loop, at a tiny size."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sluice.models.offline.demo.tasks.tasks import TASKS, generate
from sluice.models.offline.demo.training import losses
from sluice.models.offline.demo.training.experts import (
    IMPLEMENTATION,
    register_experts_implementation,
)
from sluice.models.offline.demo.training.model import build_model, demo_config
from sluice.models.offline.demo.training.packing import (
    ROW_TOKENS,
    Batch,
    Encoder,
    pack,
    training_batch,
)
from sluice.models.offline.demo.training.train import TrainConfig, Trainer, run

TINY = TrainConfig(
    steps=12,
    rows=4,
    workers=1,
    layers=2,
    hidden=64,
    experts=8,
    warmup=2,
    evaluate_every=6,
    evaluate_items=4,
)
CPU = torch.device("cpu")


def small_batch(rows: int = 2) -> Batch:
    return training_batch(Encoder(), dict.fromkeys(TASKS, 1.0), rows, seed=5)


def test_packed_conversations_do_not_see_each_other() -> None:
    model = build_model(demo_config(layers=2), seed=1).eval()
    encoder = Encoder()
    items = [next(generate(task, "train", 1)) for task in TASKS]
    packed = pack([encoder.encode([item]) for item in items])
    assert packed.ids.size(0) < len(items)
    together = losses.forward(model, packed).exits[-1]
    for index, task in enumerate(packed.tasks):
        (item,) = [item for item in items if item.task == task]
        alone = pack([encoder.encode([item])])
        expected = losses.forward(model, alone).exits[-1]
        torch.testing.assert_close(
            together[packed.segment_of == index], expected, rtol=1e-4, atol=1e-5
        )


def test_forward_agrees_with_stock_transformers() -> None:
    model = build_model(demo_config(layers=3), seed=1).eval()
    item = next(generate("sort", "train", 1))
    segment = Encoder().encode([item])
    batch = pack([segment])
    out = losses.forward(model, batch)
    stock = model(input_ids=torch.tensor([segment.ids])).logits[0]
    torch.testing.assert_close(
        losses.logits_at_exit(model, out.exits[-1]), stock[batch.where], rtol=1e-4, atol=1e-5
    )
    assert len(out.exits) == len(out.router_logits) == 3


def test_targets_are_the_answers() -> None:
    items = [next(generate(task, "train", 1)) for task in TASKS]
    encoder = Encoder()
    batch = pack([encoder.encode([item]) for item in items])
    for index, task in enumerate(batch.tasks):
        (item,) = [item for item in items if item.task == task]
        alone = encoder.encode([item])
        answer = [i for i, a in zip(alone.ids, alone.is_answer, strict=True) if a]
        assert batch.targets[batch.segment_of == index].tolist() == answer


def test_training_batch_is_deterministic_and_full() -> None:
    first, again = small_batch(8), small_batch(8)
    assert torch.equal(first.ids, again.ids)
    assert first.ids.shape == (8, ROW_TOKENS)
    assert first.used.float().mean() > 0.9


def test_a_conversation_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        pack([Encoder().encode(itertools.islice(generate("refusal", "train", 1), 8))])


def test_permuted_experts_match_the_stock_ones() -> None:
    register_experts_implementation()
    model = build_model(demo_config(layers=2), seed=1)
    experts = model.model.layers[0].mlp
    hidden = torch.randn(1, 40, 128)
    results = []
    for implementation in ("eager", IMPLEMENTATION):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        inputs = hidden.clone().requires_grad_()
        out = experts(inputs)
        out.square().sum().backward()
        grads = [parameter.grad.clone() for parameter in experts.parameters()]
        results.append([out.detach(), inputs.grad, *grads])
    for stock, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_exit_weights_rise_and_sum_to_one() -> None:
    weights = losses.exit_weights(8, 0.1)
    assert sum(weights) == pytest.approx(1)
    assert weights == sorted(weights)
    assert weights[0] == 0
    assert losses.exit_weights(8, 0.0) == [0, 0, 0, 0, 0, 0, 0, 1]


def test_dropout_rates_rise_to_the_maximum() -> None:
    rates = losses.dropout_rates(8, 0.1)
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.1)


def test_a_dropped_layer_leaves_a_row_unchanged() -> None:
    model = build_model(demo_config(layers=2), seed=1).eval()
    batch = small_batch(2)
    dropped = torch.tensor([[False, False], [True, False]])
    out = losses.forward(model, batch, dropped)
    row = batch.where // ROW_TOKENS
    assert torch.equal(out.exits[0][row == 0], out.exits[1][row == 0])
    assert not torch.equal(out.exits[0][row == 1], out.exits[1][row == 1])


def test_balance_loss_is_one_when_balanced_and_more_when_not() -> None:
    used = torch.ones(64, dtype=torch.bool)
    even = torch.eye(16).repeat(4, 1) * 1e-3
    skewed = torch.zeros(64, 16)
    skewed[:, :4] = 5.0
    assert losses.balance_loss([even], used, 1) == pytest.approx(1, abs=1e-3)
    assert losses.balance_loss([skewed], used, 4) > 2


def test_exact_matches_need_every_token() -> None:
    batch = small_batch(2)
    logits = torch.nn.functional.one_hot(batch.targets, 102).float()
    assert losses.exact_matches(logits, batch).all()
    logits[0] = 0
    matches = losses.exact_matches(logits, batch)
    assert not matches[batch.segment_of[0]]
    assert matches.sum() == len(batch.tasks) - 1


def test_loss_falls() -> None:
    trainer = Trainer(TINY, CPU)
    first = [trainer.step() for _ in range(12)]
    assert sum(first[-3:]) < 0.9 * sum(first[:3])


def test_resuming_gives_the_same_state(tmp_path: Path) -> None:
    straight = Trainer(TINY, CPU)
    for _ in range(6):
        straight.step()
    straight.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(TINY, CPU)
    resumed.restore(tmp_path / "checkpoint.pt")
    for _ in range(3):
        assert straight.step() == resumed.step()
    for ours, theirs in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert straight.task_weights() == resumed.task_weights()


def test_workers_stay_in_step(tmp_path: Path) -> None:
    config = replace(TINY, workers=2, steps=4, evaluate_every=2)
    scores = run(config, tmp_path / "two")
    assert tuple(scores) == TASKS
    again = run(config, tmp_path / "again")
    assert again == scores
    first, second = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("two", "again")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_workers_must_divide_the_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 workers"):
        run(replace(TINY, workers=3), tmp_path)


def test_answer_weights_favour_short_answers() -> None:
    batch = small_batch(4)
    weights = losses.answer_weights(batch)
    assert weights.mean() == pytest.approx(1)
    lengths = torch.bincount(batch.segment_of)
    totals = torch.zeros(len(batch.tasks)).index_add_(0, batch.segment_of, weights)
    shares = totals / lengths.sqrt()
    torch.testing.assert_close(shares, shares.mean().expand_as(shares))


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    Trainer(TINY, CPU).save(tmp_path / "checkpoint.pt")
    other = Trainer(replace(TINY, learning_rate=1e-4), CPU)
    with pytest.raises(ValueError, match="another configuration"):
        other.restore(tmp_path / "checkpoint.pt")


def test_run_writes_a_loadable_folder_and_a_log(tmp_path: Path) -> None:
    scores = run(TINY, tmp_path)
    assert set(scores) == set(TASKS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "weights")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "weights").eos_token_id == 5
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 12]
    assert lines[-1]["exits"] == scores
    assert not list(tmp_path.glob("*.partial"))
