"""Trains FiRST's routers for the demo model: which blocks a request's decode steps leave out.

Source: stage 1 of "FiRST: Finetuning Router-Selective Transformers" (arXiv 2410.12513), with the
model frozen: `h_i = h_{i-1} + rho_i f_i(h_{i-1})` at generated positions, loss `CE + lambda sum_i
rho_i + alpha |theta|^2`. Two things are ours. The pooling is the prompt's mean (the paper's is not
known to us). And rho is `sigmoid(k x)`, where k grows from 1 to `sharpness` in training: when
serving, a block is kept iff `rho >= 0.5`, and soft gates would learn to shrink blocks rather than
to do without. CE is that of a whole answer, so lambda is what a block may cost of an answer's log
likelihood.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sluice.models.demo.traces import Conversations, Model, answer_logits, draw, run

SHARPENED = 0.75
"""Share of the steps after which the gates are as sharp as they get."""


@dataclass(frozen=True)
class RouterConfig:
    """How the routers are trained.

    Attributes:
        steps: of Adam.
        rows: rows of 128 tokens in a step.
        learning_rate: peak; it decays to zero along a cosine.
        cost: lambda, price of a kept block, in nats of an answer's log likelihood.
        weight_decay: alpha.
        sharpness: what the logits are multiplied by in the end; it grows from 1.
    """

    steps: int = 600
    rows: int = 8
    learning_rate: float = 0.1
    cost: float = 0.05
    weight_decay: float = 1e-4
    sharpness: float = 16.0


class Routers(nn.Module):
    """One linear router a layer on the mean of the layer's input over the prompt."""

    def __init__(self, model: Model, calibration: Conversations) -> None:
        super().__init__()
        with torch.no_grad():
            states = run(model, calibration.batch)[:-1]
            pooled = torch.stack([calibration.prompt_mean(state) for state in states])
        layers, _, hidden = pooled.shape
        self.weight = nn.Parameter(torch.zeros(layers, hidden))
        self.bias = nn.Parameter(torch.ones(layers))
        self.mean = pooled.mean(1)
        # Inputs of length 1: with entries of size 1, Adam's steps on the weights would drown the
        # bias and every logit would jump by its rate times hidden.
        self.scale: Tensor = pooled.std(1) * math.sqrt(hidden)

    def logit(self, layer: int, pooled: Tensor) -> Tensor:
        """Router logit of each conversation: (conversations, hidden) to (conversations,)."""
        inputs = (pooled - self.mean[layer]) / self.scale[layer]
        logit: Tensor = inputs @ self.weight[layer] + self.bias[layer]
        return logit

    def tensors(self) -> dict[str, Tensor]:
        """`weight` (layers, hidden) and `bias` (layers,) for inputs as they are, fp32.

        They give x, not k x: a threshold of 0.5 is the same, and others stay apart.
        """
        weight = self.weight.detach() / self.scale
        return {"weight": weight, "bias": self.bias.detach() - (weight * self.mean).sum(1)}


def train_routers(model: Model, config: RouterConfig, seed: int) -> dict[str, Tensor]:
    """Train the routers.

    Returns:
        `weight` (layers, hidden) and `bias` (layers,), fp32.
    """
    routers = Routers(model, draw(seed, 4 * config.rows))
    optimizer = torch.optim.Adam(
        routers.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for step in range(config.steps):
        conversations = draw(seed * 1_000_003 + step, config.rows)
        sharpness = config.sharpness ** min(1.0, step / (SHARPENED * config.steps))
        loss = _loss(model, routers, conversations, sharpness, config)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return routers.tensors()


def _loss(
    model: Model,
    routers: Routers,
    conversations: Conversations,
    sharpness: float,
    config: RouterConfig,
) -> Tensor:
    shares: list[Tensor] = []

    def pick(layer: int, before: Tensor, after: Tensor) -> Tensor:
        pooled = conversations.prompt_mean(before.detach())
        gate = (sharpness * routers.logit(layer, pooled)).sigmoid()
        shares.append(gate)
        mixed = before + gate[conversations.owner][..., None] * (after - before)
        return torch.where(conversations.generated[..., None], mixed, after)

    batch, decoded = conversations.batch, conversations.decoded
    logits = answer_logits(model, run(model, batch, pick)[-1], batch)[decoded]
    loss = nn.functional.cross_entropy(logits, batch.targets[decoded], reduction="sum")
    return loss / len(batch.tasks) + config.cost * torch.stack(shares).sum(0).mean()
