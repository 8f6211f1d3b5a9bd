"""What the trained heads of a profile do to the demo model's held-out items, as Markdown tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.models.demo import losses
from sluice.models.demo.evaluate import percent
from sluice.models.demo.heads import decode_states
from sluice.models.demo.traces import Conversations, Model, Pick, answer_logits, heldout, run
from sluice.models.depth.method import ExitMethod, ExitPoint
from sluice.models.depth.registry import EXIT_METHODS
from sluice.models.profile import Profile


@dataclass(frozen=True)
class Outcome:
    """What one setting did to one task.

    Attributes:
        exact_match: share of conversations answered exactly.
        full_depth: the same without the setting.
        agreement: share of decode steps that give the token of full depth.
        layers: mean number of layers of a decode step.
        steps: number of decode steps.
    """

    exact_match: float
    full_depth: float
    agreement: float
    layers: float
    steps: int


class Leaving:
    """Runs each decode step to where an exit method leaves; use it once, as a `Pick`.

    Missing keys and values are those of the state that left (K/V propagation).
    """

    def __init__(
        self,
        method: ExitMethod,
        tensors: Mapping[str, Tensor],
        threshold: float,
        conversations: Conversations,
        last: int,
    ) -> None:
        self._method, self._tensors, self._threshold = method, tensors, threshold
        self._alive = conversations.generated.clone()
        self._left = torch.zeros_like(self._alive)
        self._last = last
        self._state: dict[str, Tensor] = {}
        self.ran = torch.zeros(self._alive.shape)

    def __call__(self, layer: int, before: Tensor, after: Tensor) -> Tensor:
        """See `Pick`."""
        state = torch.where(self._left[..., None], before, after)
        self.ran += self._alive
        if layer == self._last:
            return state
        point = ExitPoint(
            layer=layer,
            hidden=state.flatten(0, 1),
            previous=before.flatten(0, 1),
            logits=None,
            threshold=torch.full((self._alive.numel(),), self._threshold),
            state=self._state,
            tensors=self._tensors,
        )
        leaves = self._method.leaves(point).view(self._alive.shape) & self._alive
        self._left |= leaves
        self._alive &= ~leaves
        return state


class Routing:
    """Leaves out of each decode step the blocks that FiRST's routers choose; use it once."""

    def __init__(
        self, tensors: Mapping[str, Tensor], threshold: float, conversations: Conversations
    ) -> None:
        self._tensors, self._threshold, self._conversations = tensors, threshold, conversations
        self.ran = torch.zeros(conversations.generated.shape)
        self.skipped: list[Tensor] = []

    def __call__(self, layer: int, before: Tensor, after: Tensor) -> Tensor:
        """See `Pick`."""
        of, weight = self._conversations, self._tensors["weight"][layer]
        logit = of.prompt_mean(before) @ weight + self._tensors["bias"][layer]
        skips = logit.sigmoid() < self._threshold
        self.skipped.append(skips)
        passed = skips[of.owner] & of.generated
        self.ran += of.generated & ~passed
        return torch.where(passed[..., None], before, after)


@torch.no_grad()
def full_logits(model: Model, tasks: Sequence[Conversations]) -> list[Tensor]:
    """Logits at full depth, (answers, vocabulary) a task."""
    return [answer_logits(model, run(model, task.batch)[-1], task.batch) for task in tasks]


@torch.no_grad()
def measure(
    model: Model, conversations: Conversations, full: Tensor, pick: Pick, ran: Tensor
) -> Outcome:
    """Compare a setting with full depth.

    Args:
        model: the model.
        conversations: of one task.
        full: its logits at full depth.
        pick: the setting.
        ran: (rows, tokens), where `pick` counts the layers it ran.
    """
    batch, decoded = conversations.batch, conversations.decoded
    given = answer_logits(model, run(model, batch, pick)[-1], batch)
    same = (full.argmax(-1) == given.argmax(-1))[decoded]
    return Outcome(
        exact_match=float(losses.exact_matches(given, batch).float().mean()),
        full_depth=float(losses.exact_matches(full, batch).float().mean()),
        agreement=float(same.float().mean()),
        layers=float(ran[conversations.generated].mean()),
        steps=int(conversations.generated.sum()),
    )


def measure_method(
    model: Model,
    profile: Profile,
    name: str,
    threshold: float,
    tasks: Sequence[Conversations],
    fulls: Sequence[Tensor],
) -> list[Outcome]:
    """Outcome per task of `first`, or of an exit method with every exit open."""
    tensors, last = profile.tensors(name), profile.layers - 1
    outcomes = []
    for task, full in zip(tasks, fulls, strict=True):
        if name == "first":
            pick: Routing | Leaving = Routing(tensors, threshold, task)
        else:
            pick = Leaving(EXIT_METHODS[name], tensors, threshold, task, last)
        outcomes.append(measure(model, task, full, pick, pick.ran))
    return outcomes


def report(model: Model, profile: Profile, items_per_task: int, seed: int) -> str:
    """Measure all heads on held-out items."""
    tasks = list(heldout(items_per_task, seed))
    fulls = full_logits(model, tasks)
    parts = [
        _importance_table(profile),
        _classifier_table(model, profile, tasks),
        _settings_table(model, profile, tasks, fulls),
        _router_table(model, profile, tasks, fulls),
    ]
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _importance_table(profile: Profile) -> str:
    layers = [str(layer) for layer in range(profile.layers)]
    assert profile.importance is not None
    rows = [
        [str(unit), *(f"{value:.4f}" for value in values)]
        for unit, values in profile.importance.items()
    ]
    return _table(["1 - cos, layer", *layers], rows)


def _classifier_table(model: Model, profile: Profile, tasks: Sequence[Conversations]) -> str:
    tensors = profile.tensors("classifier")
    guesses, truths = [], []
    for task in tasks:
        data = decode_states(model, task)
        says = data.states[1:-1] @ tensors["weight"] + tensors["bias"] > 0
        guesses.append(says.T)
        truths.append(data.agrees[:, :-1])
    guess, truth = torch.cat(guesses), torch.cat(truths)
    right = (guess == truth).float()
    head = ["after layer", *(str(layer) for layer in range(profile.layers - 1)), "all"]
    rows = [
        ["settled", *map(percent, [*truth.float().mean(0).tolist(), float(truth.float().mean())])],
        ["classifier right", *map(percent, [*right.mean(0).tolist(), float(right.mean())])],
    ]
    return _table(head, rows)


def _settings_table(
    model: Model, profile: Profile, tasks: Sequence[Conversations], fulls: Sequence[Tensor]
) -> str:
    settings = [("q_exit", q) for q in (0.3, 0.5, 0.7, 0.9)]
    settings += [("classifier", threshold) for threshold in (0.9, 0.95, 0.98, 0.99)]
    settings += [("first", threshold) for threshold in (0.3, 0.4, 0.5, 0.6)]
    rows = []
    for name, threshold in settings:
        outcomes = measure_method(model, profile, name, threshold, tasks, fulls)
        steps = sum(each.steps for each in outcomes)
        rows.append(
            [
                f"{name}, {threshold}",
                percent(sum(each.exact_match for each in outcomes) / len(outcomes)),
                percent(sum(each.full_depth for each in outcomes) / len(outcomes)),
                percent(sum(each.agreement * each.steps for each in outcomes) / steps),
                f"{sum(each.layers * each.steps for each in outcomes) / steps:.2f}",
                f"{sum(each.layers for each in outcomes) / len(outcomes):.2f}",
            ]
        )
    head = ["method, threshold", "exact match", "full depth", "same token"]
    return _table([*head, "layers a token", "layers a token, mean of tasks"], rows)


def _router_table(
    model: Model, profile: Profile, tasks: Sequence[Conversations], fulls: Sequence[Tensor]
) -> str:
    rows = []
    outcomes = []
    for task, full in zip(tasks, fulls, strict=True):
        routing = Routing(profile.tensors("first"), 0.5, task)
        outcome = measure(model, task, full, routing, routing.ran)
        outcomes.append(outcome)
        shares = torch.stack(routing.skipped).float().mean(1)
        skipped = [f"{layer} ({share:.2f})" for layer, share in enumerate(shares) if share >= 0.05]
        numbers = [percent(outcome.exact_match), percent(outcome.full_depth)]
        skips = f"{float(shares.sum()):.2f}"
        rows.append([task.batch.tasks[0], *numbers, skips, ", ".join(skipped) or "none"])
    count = len(outcomes)
    means = [
        percent(sum(each.exact_match for each in outcomes) / count),
        percent(sum(each.full_depth for each in outcomes) / count),
        f"{sum(float(row[3]) for row in rows) / count:.2f}",
    ]
    rows.append(["mean", *means, ""])
    head = ["task", "exact match", "full depth", "skipped blocks", "block (share of requests)"]
    return _table(head, rows)
