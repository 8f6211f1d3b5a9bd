"""What exits do to the tokens of an answer, in one teacher-forced pass.

Under a causal mask a generated token depends on what lies before it alone, so all decode steps of
an answer fit in one pass. Prompts, of which the last token gives the answer's first one, run every
layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.models.depth.method import ExitMethod, ExitPoint, Tensors
from sluice.models.offline.calibrate.depth.training_data import likeliest, row_parts
from sluice.models.offline.hf_model.hooks import final_states
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.offline.hf_model.samples import SampleBatch


@dataclass(frozen=True)
class ExitSetting:
    """An exit method as a request would ask for it.

    Attributes:
        method: the method.
        tensors: its part of the profile.
        threshold: that tokens are held against.
        layers: after which they may leave, ascending, without the last one.
    """

    method: ExitMethod
    tensors: Tensors
    threshold: float
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Left:
    """Where decode steps ended up, in the order of a batch's `where`.

    Attributes:
        tokens: int64, (steps,), the likeliest token where each step left.
        layers: int64, (steps,), how many layers it ran.
    """

    tokens: Tensor
    layers: Tensor


@torch.no_grad()
def left(model: HFModel, batch: SampleBatch, setting: ExitSetting) -> Left:
    """Run each decode step to where it leaves."""
    leaving = Leaving(model, batch, setting)
    states = final_states(model, batch, leaving).flatten(0, 1)
    return Left(likeliest(model, states[batch.where[batch.decoded]]), leaving.ran)


@torch.no_grad()
def full_tokens(model: HFModel, batch: SampleBatch) -> Tensor:
    """Full depth's token at each decode step, int64, (steps,)."""
    states = final_states(model, batch).flatten(0, 1)
    return likeliest(model, states[batch.where[batch.decoded]])


class Leaving:
    """Holds decode steps back at their exits; a `StreamHook`, used once.

    Later layers get the state that left, and make their keys and values of it (K/V propagation,
    CALM, arXiv 2207.07061).

    Attributes:
        ran: int64, (steps,), layers that each step ran.
    """

    def __init__(self, model: HFModel, batch: SampleBatch, setting: ExitSetting) -> None:
        self._model, self._setting = model, setting
        self._left = torch.zeros_like(batch.used)
        self._live = batch.where[batch.decoded]
        self._steps = torch.arange(len(self._live), device=self._live.device)
        self._state: dict[str, Tensor] = {}
        self.ran = torch.full_like(self._live, model.layers)

    def __call__(self, layer: int, before: Tensor, _middle: Tensor, after: Tensor) -> Tensor:
        """See `sluice.models.offline.hf_model.hooks.StreamHook`."""
        given = torch.where(self._left.unsqueeze(-1), before, after)
        if layer in self._setting.layers and len(self._live):
            leaves = self._leaves(layer, given.flatten(0, 1), before.flatten(0, 1))
            self._left.view(-1)[self._live[leaves]] = True
            self.ran[self._steps[leaves]] = layer + 1
            self._live, self._steps = self._live[~leaves], self._steps[~leaves]
            self._state = {name: value[~leaves] for name, value in self._state.items()}
        return given

    def _leaves(self, layer: int, hidden: Tensor, previous: Tensor) -> Tensor:
        """Ask the method, a part of the live rows at a time."""
        setting, states, answers = self._setting, [], []
        for part in row_parts(self._model, len(self._live)):
            rows = hidden[self._live[part]]
            state = {name: value[part] for name, value in self._state.items()}
            logits = self._model.logits(rows) if setting.method.needs_logits else None
            point = ExitPoint(
                layer=layer,
                hidden=rows,
                previous=previous[self._live[part]],
                logits=logits,
                threshold=rows.new_full((len(rows),), setting.threshold, dtype=torch.float32),
                state=state,
                tensors=setting.tensors,
            )
            answers.append(setting.method.leaves(point))
            states.append(state)
        self._state = {name: torch.cat([state[name] for state in states]) for name in states[0]}
        return torch.cat(answers)
