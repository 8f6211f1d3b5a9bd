"""How much a layer does for later tokens: "Do Language Models Use Their Depth Efficiently?".

arXiv 2505.13898: layer s is left out of the tokens up to t, and the largest relative change of
what later layers add to the stream is taken over the tokens after t. As in the authors' code the
first token always runs, because attention rests on it, and the change is of the difference
between a layer's output and its input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sluice.models.calibrate.passes import final_states
from sluice.models.calibrate.subject import BATCH_TOKENS, Subject
from sluice.models.experts.sample_batch import Sample, SampleBatch

FEWEST_TOKENS = 3
"""Of a text: one that always runs, one that a layer is left out of, one after it."""
_SMALLEST = 1e-6
"""What a change is divided by at least, as in the authors' code."""


def future_effect(subject: Subject, sample: Sample, last: int) -> Tensor:
    """Effect of each layer on one text.

    For layer s: the largest |d_l - d'_l| / |d_l| over layers l > s and tokens after `last`. d_l is
    what layer l adds to the stream at full depth, and d'_l what it adds where layer s is left out
    of tokens 1 to `last`: its output is its input there, which later layers' keys and values come
    from. The last layer's effect is 0.

    The text runs in the same passes with nothing left out and with one layer each, so nothing of
    full depth's has to be kept, and both are rounded alike.

    Args:
        subject: the model.
        sample: the text, prompt and answer.
        last: in 1 to the text's length - 2.

    Returns:
        fp32, (layers,), on the CPU.
    """
    length = len(sample.prompt) + len(sample.answer)
    room = max(1, BATCH_TOKENS // length - 1)
    starts = range(0, subject.layers, room)
    parts = [
        _effects(subject, sample, last, range(start, min(start + room, subject.layers)))
        for start in starts
    ]
    return torch.cat(parts).cpu()


def _effects(subject: Subject, sample: Sample, last: int, layers: range) -> Tensor:
    """Effects of adjacent layers, fp32, (layers,): row 0 runs all, row i + 1 not the i-th."""
    batch = SampleBatch.of([sample] * (1 + len(layers)), subject.device)
    effects = torch.zeros(len(layers), device=subject.device)

    def watch(layer: int, before: Tensor, _middle: Tensor, after: Tensor) -> Tensor | None:
        earlier = min(max(layer - layers.start, 0), len(layers))
        if earlier:
            added = (after[: 1 + earlier, last + 1 :] - before[: 1 + earlier, last + 1 :]).float()
            change = (added[1:] - added[0]).norm(dim=-1)
            change = change / added[0].norm(dim=-1).clamp_min(_SMALLEST)
            effects[:earlier] = torch.maximum(effects[:earlier], change.amax(-1))
        if layer not in layers:
            return None
        given = after.clone()
        row = 1 + layer - layers.start
        given[row, 1 : last + 1] = before[row, 1 : last + 1]
        return given

    final_states(subject, batch, watch)
    return effects
