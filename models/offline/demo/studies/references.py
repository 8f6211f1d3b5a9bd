"""Samples of the training split that the demo model answers right, as C3PO's references are.

Prompts are those that the server sees, chat template included, and embeddings are made as it makes
them. The profile's own references, with their pathways, are the calibration's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.models.experts.remix import prompt_embedding
from sluice.models.offline.demo.tasks.tasks import TASKS, Item, distinct
from sluice.models.offline.demo.training.model import Model
from sluice.models.offline.demo.training.packing import Encoder
from sluice.models.offline.hf_model.samples import Sample, SampleBatch

PER_TASK = 100
SPARE = 1.25
"""Items drawn for each reference wanted, because some may be answered wrong."""


@dataclass(frozen=True)
class References:
    """Samples that the model answers right.

    Attributes:
        items: the samples.
        embeddings: fp32, (samples, hidden): mean input embedding of each prompt's tokens.
    """

    items: tuple[Item, ...]
    embeddings: Tensor


def encoded(item: Item) -> Sample:
    """An item as the chat template gives it."""
    segment = Encoder().encode([item])
    start = segment.is_answer.index(True)
    return Sample(segment.ids[:start], segment.ids[start:])


@torch.no_grad()
def find_references(
    model: Model,
    seed: int,
    per_task: int = PER_TASK,
    tasks: Sequence[str] = TASKS,
    spare: float = SPARE,
) -> References:
    """Draw training items and keep the first of each task that greedy decoding answers exactly.

    Args:
        model: in fp32, in evaluation mode.
        seed: of the draw.
        per_task: references of each task.
        tasks: that they are drawn from.
        spare: items drawn for each reference wanted, at least 1.

    Raises:
        ValueError: the model answers too few items of a task.
    """
    kept: list[Item] = []
    embeddings: list[Tensor] = []
    for task in tasks:
        items = distinct(task, "train", seed, math.ceil(spare * per_task))
        batch = SampleBatch.of([encoded(item) for item in items])
        right = batch.exact(batch.answer_logits(model)).nonzero().flatten()[:per_task]
        if len(right) < per_task:
            raise ValueError(f"task {task!r}: {len(right)} right answers, {per_task} wanted")
        inputs = model.get_input_embeddings()(batch.ids)
        kept += [items[index] for index in right.tolist()]
        embeddings += [prompt_embedding(inputs[index, batch.prompts[index]]) for index in right]
    return References(tuple(kept), torch.stack(embeddings))
