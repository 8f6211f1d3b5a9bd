"""Trains the exit heads of a profile on the frozen model's hidden states at decode steps.

Both heads are shared by all layers and read the residual stream as it is, in fp32: inputs are
standardised for training and the scaling is folded into the first weight afterwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sluice.models.calibrate.heads import folded, log_exit_shares
from sluice.models.demo import losses
from sluice.models.demo.traces import Conversations, Model, answer_logits, run

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class DecodeStates:
    """What the heads learn from; all fp32, at generated positions only.

    Attributes:
        states: (layers + 1, tokens, hidden), before the first and after every layer.
        loss: (tokens, layers), cross-entropy of the answer's token when leaving after a layer.
        agrees: (tokens, layers) bool, whether the layer's likeliest token is the last layer's.
        weights: (tokens,), mean 1: a token of a long answer counts less.
    """

    states: Tensor
    loss: Tensor
    agrees: Tensor
    weights: Tensor

    @classmethod
    def joined(cls, parts: "Sequence[DecodeStates]") -> "DecodeStates":
        """The tokens of all parts."""
        return cls(
            states=torch.cat([part.states for part in parts], dim=1),
            loss=torch.cat([part.loss for part in parts]),
            agrees=torch.cat([part.agrees for part in parts]),
            weights=torch.cat([part.weights for part in parts]),
        )


@torch.no_grad()
def decode_states(model: Model, conversations: Conversations) -> DecodeStates:
    """Run the model once at full depth."""
    batch, decoded = conversations.batch, conversations.decoded
    states = run(model, batch)
    logits = [answer_logits(model, state, batch)[decoded] for state in states[1:]]
    targets = batch.targets[decoded]
    loss = [nn.functional.cross_entropy(each, targets, reduction="none") for each in logits]
    answer = logits[-1].argmax(-1)
    weights = losses.answer_weights(batch)[decoded]
    return DecodeStates(
        states=torch.stack([state.flatten(0, 1)[batch.where][decoded] for state in states]),
        loss=torch.stack(loss, dim=1),
        agrees=torch.stack([each.argmax(-1) == answer for each in logits], dim=1),
        weights=weights / weights.mean(),
    )


@dataclass(frozen=True)
class HeadConfig:
    """How the exit heads are trained.

    Attributes:
        runs: of 64 rows of 128 tokens, whose decode steps are the training data.
        steps: of Adam, each on `tokens` tokens.
        tokens: per step.
        learning_rate: peak; it decays to zero along a cosine.
        inner: width of the q_exit head.
        prior: `lambda_p`, rate of the geometric prior over exits.
        beta: weight of the divergence from the prior.
    """

    runs: int = 24
    steps: int = 1_500
    tokens: int = 1_024
    learning_rate: float = 1e-2
    inner: int = 64
    prior: float = 0.7
    beta: float = 0.05


def train_classifier(data: DecodeStates, config: HeadConfig, seed: int) -> Tensors:
    """Train CALM's linear classifier (arXiv 2207.07061): does this exit's token equal the last's?

    Binary cross-entropy over all layers but the last.

    Returns:
        `weight` (hidden,) and `bias` (), fp32.
    """
    inputs = data.states[1:-1].transpose(0, 1)
    mean, scale = _scaling(inputs)
    head = nn.Linear(inputs.size(-1), 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    right = data.agrees[:, :-1].float()

    def loss(rows: Tensor) -> Tensor:
        logits = head((inputs[rows] - mean) / scale).squeeze(-1)
        each = nn.functional.binary_cross_entropy_with_logits(logits, right[rows], reduction="none")
        return (each.mean(1) * data.weights[rows]).mean()

    _descend(head, loss, len(inputs), config, seed)
    weight, bias = folded(head, mean, scale)
    return {"weight": weight.squeeze(0), "bias": bias.squeeze(0)}


def train_q_exit(data: DecodeStates, config: HeadConfig, seed: int) -> Tensors:
    """Train PALBERT's halting head (NeurIPS 2022).

    Loss: `sum_i P(i) L_i + beta KL(P || Geom(lambda_p))`, where `P(i)` is the probability of
    leaving after layer i and the last layer takes the rest, of `P` and of the prior.

    Returns:
        Weights and biases of the three layers, as `sluice.models.depth.q_exit` names them, fp32.
    """
    inputs = torch.cat([data.states[1:-1], data.states[:-2]], dim=-1).transpose(0, 1)
    mean, scale = _scaling(inputs)
    torch.manual_seed(seed)
    layers = [
        nn.Linear(inputs.size(-1), config.inner),
        nn.Linear(config.inner, config.inner),
        nn.Linear(config.inner, 1),
    ]
    head = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    exits = data.loss.size(1)
    prior = log_exit_shares(torch.full((1, exits - 1), config.prior).logit())

    def loss(rows: Tensor) -> Tensor:
        shares = log_exit_shares(head((inputs[rows] - mean) / scale).squeeze(-1))
        away = (shares.exp() * (shares - prior)).sum(1)
        each = (shares.exp() * data.loss[rows]).sum(1) + config.beta * away
        return (each * data.weights[rows]).mean()

    _descend(head, loss, len(inputs), config, seed)
    parts = [folded(layers[0], mean, scale)]
    parts += [(layer.weight.detach(), layer.bias.detach()) for layer in layers[1:]]
    tensors: Tensors = {}
    for index, (weight, bias) in enumerate(parts):
        tensors[f"{index}.weight"], tensors[f"{index}.bias"] = weight, bias
    return tensors


def _scaling(inputs: Tensor) -> tuple[Tensor, Tensor]:
    flat = inputs.flatten(0, 1)
    return flat.mean(0), flat.std(0)


def _descend(
    head: nn.Module, loss: Callable[[Tensor], Tensor], count: int, config: HeadConfig, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(head.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for _ in range(config.steps):
        value = loss(torch.randint(count, (config.tokens,), generator=generator))
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
