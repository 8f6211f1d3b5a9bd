"""Step: FiRST's routers, which choose from a prompt the blocks that its answer leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sluice.models.offline.calibrate.depth.training_data import TrainSplit, draws, row_parts
from sluice.models.offline.calibrate.step import Calibration, Step, check_least, option
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.offline.hf_model.samples import Sample, SampleBatch

REACH = 8.0
"""How far a step of Adam on the weights may move a logit, in steps of the bias."""
SHARPENED = 0.75
"""Share of the steps after which the gates are as sharp as they get."""


@dataclass(frozen=True)
class Routers(Step):
    """Trains `first`: stage 1 of FiRST (arXiv 2410.12513), the routers with the model frozen.

    At decode steps of the model's own answers to the training half of the prompts
    (`TrainSplit`), layer i gives `h_i = h_{i-1} + rho_i f_i(h_{i-1})`, one rho a prompt and layer;
    prompts run every layer. The loss is `CE + lambda sum_i rho_i + alpha |theta|^2`; CE is that of
    full depth's tokens, averaged over an answer, and then over answers. So lambda is what a block
    may cost of a token's log likelihood.

    Two things are not the paper's. The pooling is the prompt's mean (the paper's is not known to
    us). And rho is `sigmoid(k x)`, where k grows from 1 to `sharpness`: when serving, a block is
    kept iff `rho >= 0.5`, and soft gates would learn to shrink blocks rather than to do without.

    A step of the training keeps the activations of `tokens` tokens through all layers.
    """

    name: ClassVar[str] = "routers"
    help: ClassVar[str] = "FiRST's routers, which choose a request's blocks from its prompt"

    steps: int = option(600, "steps of Adam")
    tokens: int = option(1024, "tokens of a step, padding included, if a sample is not longer")
    learning_rate: float = option(0.1, "peak; it decays to zero along a cosine")
    cost: float = option(0.01, "lambda: price of a kept block, in nats a token")
    weight_decay: float = option(1e-4, "alpha")
    sharpness: float = option(16.0, "what router logits are multiplied by in the end")

    def run(self, calibration: Calibration) -> Part:
        """Train.

        Raises:
            CalibrationError: an option is out of range, or fewer than two answers have a second
                token.
        """
        self._check()
        train = TrainSplit.of(calibration).train
        if len(train) < 2:
            raise CalibrationError(
                "routers: it takes two prompts or more to learn from, whose answers have a second "
                "token"
            )
        model = calibration.model
        routers = BlockRouters(*pooled_inputs(calibration, train))
        optimizer = torch.optim.Adam(
            routers.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        drawn = draws(train, self.tokens, calibration.seed)
        steps = calibration.track(range(self.steps), "training of the routers", self.steps)
        for step, samples in zip(steps, drawn, strict=False):
            sharpness = self.sharpness ** min(1.0, step / (SHARPENED * self.steps))
            batch = SampleBatch.of(samples, model.device)
            loss = router_loss(model, routers, batch, sharpness, self.cost)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return Part(heads={f"first.{name}": t for name, t in routers.tensors().items()})

    def _check(self) -> None:
        check_least(self, {"steps": 1, "tokens": 1, "sharpness": 1, "cost": 0, "weight_decay": 0})
        if self.learning_rate <= 0:
            raise CalibrationError("routers: learning_rate must be above 0")


class BlockRouters(nn.Module):
    """One linear router a layer on the mean of the layer's input over the prompt.

    Takes mean and deviation of what the routers read, fp32, (layers, hidden) both.
    """

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        layers, hidden = mean.shape
        self.weight = nn.Parameter(torch.zeros_like(mean))
        self.bias = nn.Parameter(mean.new_ones(layers))
        self.mean = mean
        # A step of Adam moves each weight by its rate: without this, a logit would jump by the
        # rate times hidden, and drown the bias. With too little left, all blocks are lost before
        # the weights have learnt which prompts need them.
        self.scale = deviation * (hidden / REACH)

    def logit(self, layer: int, pooled: Tensor) -> Tensor:
        """Router logit of each prompt: (prompts, hidden) to (prompts,)."""
        inputs = (pooled - self.mean[layer]) / self.scale[layer]
        logit: Tensor = inputs @ self.weight[layer] + self.bias[layer]
        return logit

    def tensors(self) -> dict[str, Tensor]:
        """`weight` (layers, hidden) and `bias` (layers,) for inputs as they are, fp32.

        They give x, not k x: a threshold of 0.5 is the same, and others stay apart.
        """
        weight = self.weight.detach() / self.scale
        return {"weight": weight, "bias": self.bias.detach() - (weight * self.mean).sum(1)}


def prompt_means(states: Tensor, batch: SampleBatch) -> Tensor:
    """Mean over each prompt's tokens: (samples, tokens, hidden) to fp32, (samples, hidden)."""
    inside = batch.prompts.unsqueeze(-1)
    return states.float().masked_fill(~inside, 0.0).sum(1) / inside.sum(1)


@torch.no_grad()
def pooled_inputs(calibration: Calibration, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over prompts of what each layer's router reads.

    Returns:
        fp32, (layers, hidden) both; the deviation is 1 where it is 0.
    """
    model = calibration.model
    shape = model.layers, model.hidden
    total = torch.zeros(shape, dtype=torch.float64, device=model.device)
    squares = torch.zeros_like(total)
    batches = list(model.batches(samples))
    for _, batch in calibration.track(batches, "inputs of the routers", len(batches)):

        def add(
            layer: int, before: Tensor, _middle: Tensor, _after: Tensor, of: SampleBatch = batch
        ) -> None:
            pooled = prompt_means(before, of).double()
            total[layer] += pooled.sum(0)
            squares[layer] += pooled.square().sum(0)

        final_states(model, batch, add)
    mean = total / len(samples)
    spread = (squares / len(samples) - mean.square()).clamp_min(0.0).sqrt().float()
    return mean.float(), torch.where(spread > 0, spread, torch.ones_like(spread))


def router_loss(
    model: HFModel, routers: BlockRouters, batch: SampleBatch, sharpness: float, cost: float
) -> Tensor:
    """Run a batch with soft gates; see `Routers`.

    Args:
        model: the model.
        routers: what is trained.
        batch: samples with a decode step each.
        sharpness: what logits are multiplied by.
        cost: price of a kept block.

    Returns:
        The loss without the weights' own, fp32, ().
    """
    shares: list[Tensor] = []
    generated = batch.generated.unsqueeze(-1)

    def mix(layer: int, before: Tensor, _middle: Tensor, after: Tensor) -> Tensor:
        pooled = prompt_means(before.detach(), batch)
        gate = (sharpness * routers.logit(layer, pooled)).sigmoid()
        shares.append(gate)
        mixed = before + gate.to(after.dtype)[:, None, None] * (after - before)
        return torch.where(generated, mixed, after)

    states = final_states(model, batch, mix).flatten(0, 1)[batch.where[batch.decoded]]
    targets, owner = batch.targets[batch.decoded], batch.owner[batch.decoded]
    each = torch.cat(
        [
            checkpoint(_token_losses, model, states[part], targets[part], use_reentrant=False)
            for part in row_parts(model, len(states))
        ]
    )
    weights = 1.0 / torch.bincount(owner)[owner]
    answers = len(batch.last)
    return (each * weights).sum() / answers + cost * torch.stack(shares).sum(0).mean()


def _token_losses(model: HFModel, states: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model.logits(states).float(), tokens, reduction="none")
