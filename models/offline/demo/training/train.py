"""Trains the demo model.

Run as ``python -m sluice.models.offline.demo.training.train --out DIR --seed 17``.

One run from a seed writes resumable checkpoints, a log of held-out exact match, and a weights
folder that plain transformers and plain vLLM load. It is deterministic for a given seed, machine
and thread count.
"""

import argparse
import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sluice.models.offline.demo.tasks.tasks import TASKS, distinct
from sluice.models.offline.demo.training import losses
from sluice.models.offline.demo.training.experts import (
    IMPLEMENTATION,
    register_experts_implementation,
)
from sluice.models.offline.demo.training.model import build_model, demo_config, export
from sluice.models.offline.demo.training.packing import Batch, Encoder, pack, training_batch
from sluice.models.offline.demo.training.workers import Team, run_team

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the trained weights, but for the machine and its thread count.

    Attributes:
        seed: seed of the initial weights, the data and the dropout.
        steps: step budget; the learning rate decays to zero over it.
        rows: rows of 128 tokens in a step, over all workers.
        workers: processes that share a step, each with one thread.
        layers: decoder layers.
        hidden: hidden size.
        experts: experts in a layer.
        learning_rate: peak of the schedule.
        warmup: steps of linear warm-up.
        weight_decay: AdamW's, on matrices.
        exit_scale: LayerSkip's ``e_s``.
        layer_dropout: LayerSkip's ``p_max``.
        balance: coefficient of the load-balancing loss.
        stop_at: training stops once every task reaches this held-out exact match.
        evaluate_every: steps between held-out evaluations and checkpoints.
        evaluate_items: held-out items per task in those.
    """

    seed: int = 17
    steps: int = 3_500
    rows: int = 16
    workers: int = 2
    layers: int = 8
    hidden: int = 128
    experts: int = 16
    learning_rate: float = 1.5e-3
    warmup: int = 200
    weight_decay: float = 0.05
    exit_scale: float = 0.1
    layer_dropout: float = 0.1
    balance: float = 0.01
    stop_at: float = 0.995
    evaluate_every: int = 250
    evaluate_items: int = 200


class Trainer:
    """A training run: the model, its optimiser, the task mix and the step count."""

    _RATE = 0.02
    _FLOOR = 0.1

    def __init__(self, config: TrainConfig, device: torch.device, team: Team | None = None) -> None:
        """Start at step 0."""
        register_experts_implementation()
        self.config = config
        self.device = device
        self._team = team or Team()
        shape = demo_config(config.layers, config.hidden, config.experts)
        self.model: Qwen3MoeForCausalLM = build_model(shape, config.seed)
        torch.nn.Module.to(self.model, device)
        self.model.set_experts_implementation(IMPLEMENTATION)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self._encoder = Encoder()
        self._exit_weights = losses.exit_weights(config.layers, config.exit_scale)
        self._dropout_rates = losses.dropout_rates(config.layers, config.layer_dropout)
        self._accuracy = dict.fromkeys(TASKS, 0.0)
        self.done_steps = 0
        self.seen_tokens = 0
        self.seconds = 0.0

    def task_weights(self) -> dict[str, float]:
        """Draw tasks more often the worse they go: from running exact match on training items."""
        return {task: self._FLOOR + 1 - accuracy for task, accuracy in self._accuracy.items()}

    def learning_rate(self) -> float:
        """Give the rate of the next step: linear warm-up, then a cosine to zero."""
        done, config = self.done_steps, self.config
        if done < config.warmup:
            return config.learning_rate * (done + 1) / config.warmup
        progress = (done - config.warmup) / max(1, config.steps - config.warmup)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def step(self) -> float:
        """Train on one batch and return its loss."""
        started = time.monotonic()
        config = self.config
        seed = (config.seed * 1_000_003 + self.done_steps) * self._team.size + self._team.rank
        rows = config.rows // self._team.size
        batch = training_batch(self._encoder, self.task_weights(), rows, seed).to(self.device)
        generator = torch.Generator().manual_seed(seed)
        dropped = losses.draw_dropout(self._dropout_rates, rows, generator).to(self.device)

        self.model.train()
        out = losses.forward(self.model, batch, dropped)
        logits = [losses.logits_at_exit(self.model, hidden) for hidden in out.exits]
        loss = losses.early_exit_loss(
            logits, batch.targets, self._exit_weights, losses.answer_weights(batch)
        )
        top_k = self.model.config.num_experts_per_tok
        balance = losses.balance_loss(out.router_logits, batch.used.flatten(), top_k)
        (loss + config.balance * balance).backward()  # type: ignore[no-untyped-call]
        self._team.average_gradients(self.model.parameters())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self._optimizer.step()
        self._optimizer.zero_grad()

        self._follow(batch, losses.exact_matches(logits[-1].detach(), batch).tolist())
        self.done_steps += 1
        self.seconds += time.monotonic() - started
        return float(loss.detach())

    def _follow(self, batch: Batch, matches: list[bool]) -> None:
        counts = torch.zeros(2, len(TASKS) + 1, dtype=torch.long)
        for task, match in zip(batch.tasks, matches, strict=True):
            counts[:, TASKS.index(task)] += torch.tensor([1, match])
        counts[:, -1] = batch.used.sum()
        (*tried, tokens), (*passed, _) = self._team.total(counts).tolist()
        self.seen_tokens += tokens
        for task, trials, passes in zip(TASKS, tried, passed, strict=True):
            if trials:
                rate = 1 - (1 - self._RATE) ** trials
                self._accuracy[task] += rate * (passes / trials - self._accuracy[task])

    @torch.no_grad()
    def evaluate(self) -> dict[str, list[float]]:
        """Measure held-out exact match per task: one figure per layer that could be the exit."""
        self.model.train(False)
        scores: dict[str, list[float]] = {}
        for task in TASKS[self._team.rank :: self._team.size]:
            items = distinct(task, "heldout", self.config.seed, self.config.evaluate_items)
            batch = pack([self._encoder.encode([item]) for item in items]).to(self.device)
            out = losses.forward(self.model, batch)
            matches = [
                losses.exact_matches(losses.logits_at_exit(self.model, hidden), batch)
                for hidden in out.exits
            ]
            scores[task] = [float(match.float().mean()) for match in matches]
        for part in self._team.gather(scores):
            scores |= part
        return {task: scores[task] for task in TASKS}

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "accuracy": self._accuracy,
            "done_steps": self.done_steps,
            "seen_tokens": self.seen_tokens,
            "seconds": self.seconds,
        }
        unfinished = path.with_suffix(".partial")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: if it was made with another configuration.
        """
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        if state["config"] != asdict(self.config):
            raise ValueError(f"{path} was made with another configuration: {state['config']}")
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._accuracy = state["accuracy"]
        self.done_steps = state["done_steps"]
        self.seen_tokens = state["seen_tokens"]
        self.seconds = state["seconds"]


def run(config: TrainConfig, out: Path) -> dict[str, list[float]]:
    """Train until the bar or the budget is reached, resuming from ``out`` if it holds a checkpoint.

    ``out/weights`` holds the model of the last evaluation, ``out/log.jsonl`` a line for each.

    Returns:
        Held-out exact match per task and exit, as ``Trainer.evaluate``.
    """
    if config.rows % config.workers:
        raise ValueError(f"{config.rows} rows cannot be shared by {config.workers} workers")
    return run_team(config.workers, partial(_run_member, config, out))


def _run_member(config: TrainConfig, out: Path, team: Team) -> dict[str, list[float]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(config, device, team)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.restore(checkpoint)
        _LOG.info("rank %d resumed at step %d", team.rank, trainer.done_steps)
    running = 0.0
    scores: dict[str, list[float]] = {}
    while trainer.done_steps < config.steps:
        loss = trainer.step()
        running = loss if not running else 0.98 * running + 0.02 * loss
        if trainer.done_steps % config.evaluate_every and trainer.done_steps < config.steps:
            continue
        scores = trainer.evaluate()
        if team.rank == 0:
            _LOG.info(_report(trainer, running, scores))
            trainer.save(checkpoint)
            export(trainer.model, out / "weights")
            with (out / "log.jsonl").open("a") as lines:
                figures: dict[str, Any] = {"step": trainer.done_steps}
                figures |= {"tokens": trainer.seen_tokens, "seconds": trainer.seconds}
                figures |= {"loss": running, "exits": scores}
                lines.write(json.dumps(figures) + "\n")
        if min(exits[-1] for exits in scores.values()) >= config.stop_at:
            break
    return scores


def _report(trainer: Trainer, loss: float, scores: dict[str, list[float]]) -> str:
    speed = trainer.seen_tokens / max(trainer.seconds, 1e-9)
    final = " ".join(f"{task} {exits[-1]:.2f}" for task, exits in scores.items())
    return (
        f"step {trainer.done_steps} loss {loss:.3f} {trainer.seconds:.0f} s {speed:.0f} tokens/s "
        f"min {min(exits[-1] for exits in scores.values()):.2f} | {final}"
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.demo.training.train", description=__doc__
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints and weights"
    )
    for field in fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = {field.name: getattr(arguments, field.name) for field in fields(TrainConfig)}
    run(TrainConfig(**chosen), arguments.out)


if __name__ == "__main__":
    main()
