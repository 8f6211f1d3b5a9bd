"""Step: heads that say when a generated token may leave.

Both are shared by all layers and read the residual stream as it is, in fp32: inputs are
standardised for training and the scaling is folded into the first weight afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sluice.models.offline.calibrate.depth.training_data import (
    TokenStates,
    TrainSplit,
    likeliest,
    token_losses,
)
from sluice.models.offline.calibrate.step import Calibration, Step, check_least, option
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.hf_model.examples import CalibrationError
from sluice.models.offline.hf_model.model import HFModel


@dataclass(frozen=True)
class Heads(Step):
    """Trains `classifier` (CALM, arXiv 2207.07061) and `q_exit` (PALBERT, NeurIPS 2022).

    The model is frozen. They learn from decode steps of its own answers to the first half of the
    prompts (`TrainSplit`); the right token is full depth's. The tokens' states of all layers stay
    in the model's dtype: `tokens` x (layers + 1) x hidden numbers.

    The classifier learns, by binary cross-entropy, whether a layer's likeliest token is full
    depth's; layers count the same. The halting head minimises `sum_i P(i) L_i + beta KL(P ||
    Geom(lambda_p))`, where `P(i)` is the probability of leaving after layer i, `L_i` the
    cross-entropy of full depth's token there, and the last layer takes the rest, of `P` and of the
    prior. PALBERT has 0.1 and 0.5 for lambda_p and beta. All prompts weigh the same.
    """

    name: ClassVar[str] = "heads"
    help: ClassVar[str] = "exit heads of the methods classifier and q_exit"

    tokens: int = option(4096, "generated tokens that the heads learn from, at most")
    steps: int = option(1500, "steps of Adam")
    rows: int = option(512, "tokens of a step")
    learning_rate: float = option(1e-2, "peak; it decays to zero along a cosine")
    inner: int = option(64, "width of the q_exit head")
    prior: float = option(0.7, "lambda_p: rate of the geometric prior over exits")
    beta: float = option(0.05, "weight of the divergence from the prior")

    def refusal(self, calibration: Calibration) -> str | None:
        """See `Step.refusal`."""
        if calibration.model.layers < 2:
            return "a model of one layer has no exits"
        return super().refusal(calibration)

    def run(self, calibration: Calibration) -> Part:
        """Train.

        Raises:
            CalibrationError: an option is out of range, or there are fewer than two tokens to
                learn from.
        """
        self._check()
        train = TrainSplit.of(calibration).train
        if not train:
            raise CalibrationError("heads: no answer has a second token: nothing to learn from")
        data = TokenStates.of(calibration, train, self.tokens, calibration.seed)
        if data.states.size(1) < 2:
            raise CalibrationError("heads: one generated token is too few to learn from")
        exits = ExitData.of(calibration.model, data)
        heads = {
            "classifier": train_classifier(exits, self, calibration),
            "q_exit": train_q_exit(exits, self, calibration),
        }
        return Part(
            heads={f"{head}.{name}": t for head, part in heads.items() for name, t in part.items()}
        )

    def _check(self) -> None:
        check_least(self, {"tokens": 2, "steps": 1, "rows": 1, "inner": 1, "beta": 0})
        if not 0 < self.prior < 1:
            raise CalibrationError("heads: prior must lie between 0 and 1")
        if self.learning_rate <= 0:
            raise CalibrationError("heads: learning_rate must be above 0")


@dataclass(frozen=True)
class ExitData:
    """What exits would make of tokens.

    Attributes:
        states: of `TokenStates`.
        losses: fp32, (tokens, layers), cross-entropy of full depth's token after each layer.
        agrees: bool, (tokens, layers), whether the layer's likeliest token is full depth's.
        weights: of `TokenStates`.
        mean: fp32, (hidden,), of the states after each layer but the last.
        mean_before: fp32, (hidden,), of the states before those layers.
        scale: fp32, (hidden,), standard deviation, 1 where it is 0.
        scale_before: as `scale`.
    """

    states: Tensor
    losses: Tensor
    agrees: Tensor
    weights: Tensor
    mean: Tensor
    mean_before: Tensor
    scale: Tensor
    scale_before: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: HFModel, tokens: TokenStates) -> ExitData:
        """Hold each layer's tokens against full depth's."""
        full = likeliest(model, tokens.states[-1])
        exits = [token_losses(model, states, full) for states in tokens.states[1:]]
        mean, scale = _scaling(tokens.states[1:-1])
        mean_before, scale_before = _scaling(tokens.states[:-2])
        return cls(
            tokens.states,
            torch.stack([losses for losses, _ in exits], dim=1),
            torch.stack([right for _, right in exits], dim=1),
            tokens.weights,
            mean,
            mean_before,
            scale,
            scale_before,
        )

    def after(self, rows: Tensor) -> Tensor:
        """Standardised states after each layer but the last: fp32, (rows, layers - 1, hidden)."""
        return (self.states[1:-1, rows].transpose(0, 1).float() - self.mean) / self.scale

    def around(self, rows: Tensor) -> Tensor:
        """The same, those before the layers beside them: fp32, (rows, layers - 1, 2 hidden)."""
        before = self.states[:-2, rows].transpose(0, 1).float()
        before = (before - self.mean_before) / self.scale_before
        return torch.cat([self.after(rows), before], dim=-1)


def train_classifier(data: ExitData, options: Heads, calibration: Calibration) -> dict[str, Tensor]:
    """Train the linear classifier.

    Returns:
        `weight` (hidden,) and `bias` (), fp32.
    """
    width, device = data.mean.numel(), data.mean.device
    head = nn.utils.skip_init(nn.Linear, width, 1, device=device)  # type: ignore[no-untyped-call]
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    right = data.agrees[:, :-1].float()

    def loss(rows: Tensor) -> Tensor:
        logits = head(data.after(rows)).squeeze(-1)
        each = nn.functional.binary_cross_entropy_with_logits(logits, right[rows], reduction="none")
        return (each.mean(1) * data.weights[rows]).mean()

    _descend(head, loss, data, options, calibration)
    weight, bias = folded(head, data.mean, data.scale)
    return {"weight": weight.squeeze(0), "bias": bias.squeeze(0)}


def train_q_exit(data: ExitData, options: Heads, calibration: Calibration) -> dict[str, Tensor]:
    """Train the halting head.

    Returns:
        Weights and biases of the three layers, as `sluice.models.depth.exits.q_exit` names them,
        fp32.
    """
    width, inner = 2 * data.mean.numel(), options.inner
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(calibration.seed)
        layers = [nn.Linear(width, inner), nn.Linear(inner, inner), nn.Linear(inner, 1)]
    head = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    head.to(data.mean.device)
    exits = data.losses.size(1)
    prior = log_exit_shares(torch.full((1, exits - 1), options.prior).logit()).to(data.mean.device)

    def loss(rows: Tensor) -> Tensor:
        shares = log_exit_shares(head(data.around(rows)).squeeze(-1))
        away = (shares.exp() * (shares - prior)).sum(1)
        each = (shares.exp() * data.losses[rows]).sum(1) + options.beta * away
        return (each * data.weights[rows]).mean()

    _descend(head, loss, data, options, calibration)
    mean = torch.cat([data.mean, data.mean_before])
    scale = torch.cat([data.scale, data.scale_before])
    parts = [folded(layers[0], mean, scale)]
    parts += [(layer.weight.detach(), layer.bias.detach()) for layer in layers[1:]]
    tensors: dict[str, Tensor] = {}
    for index, (weight, bias) in enumerate(parts):
        tensors[f"{index}.weight"], tensors[f"{index}.bias"] = weight, bias
    return tensors


def log_exit_shares(halting: Tensor) -> Tensor:
    """Log probability of each exit, (tokens, exits), from halting logits, (tokens, exits - 1)."""
    stays = nn.functional.logsigmoid(-halting).cumsum(1)
    before = torch.cat([torch.zeros_like(stays[:, :1]), stays[:, :-1]], dim=1)
    return torch.cat([before + nn.functional.logsigmoid(halting), stays[:, -1:]], dim=1)


def _scaling(states: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over layers and tokens, a layer at a time."""
    total = torch.zeros(states.size(-1), dtype=torch.float64, device=states.device)
    squares = torch.zeros_like(total)
    for layer in states:
        total += layer.double().sum(0)
    mean = total / (states.size(0) * states.size(1))
    for layer in states:
        squares += (layer.double() - mean).square().sum(0)
    scale = (squares / (states.size(0) * states.size(1))).sqrt().float()
    return mean.float(), torch.where(scale > 0, scale, torch.ones_like(scale))


def folded(layer: nn.Linear, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias for inputs as they are, of a layer that was trained on standardised ones."""
    weight = layer.weight.detach() / scale
    return weight, layer.bias.detach() - weight @ mean


def _descend(
    head: nn.Module,
    loss: Callable[[Tensor], Tensor],
    data: ExitData,
    options: Heads,
    calibration: Calibration,
) -> None:
    generator = torch.Generator().manual_seed(calibration.seed)
    optimizer = torch.optim.Adam(head.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in calibration.track(range(options.steps), "training of an exit head", options.steps):
        rows = torch.randint(len(data.weights), (options.rows,), generator=generator)
        value = loss(rows.to(data.weights.device))
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
