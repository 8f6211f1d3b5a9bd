"""Re-mix references of the demo model: C3PO's samples that it answers right (arXiv 2504.07964).

Prompts are those that the server sees, chat template included, and embeddings are made as it makes
them. Everything is of the training split.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sluice.models.demo.packing import Encoder
from sluice.models.demo.tasks import TASKS, Item, distinct
from sluice.models.demo.traces import Model
from sluice.models.experts.references import prompt_embedding
from sluice.models.experts.sample_batch import Sample, SampleBatch
from sluice.models.experts.softmax_routers import recorded_scores, softmax_routers
from sluice.models.profile import Profile
from sluice.models.profile_writer import write_profile

SET_NAME = "tasks"
"""The one set of the demo profile: samples of all tasks."""
PER_TASK = 100
SPARE = 1.25
"""Items drawn for each reference wanted, because some may be answered wrong."""


@dataclass(frozen=True)
class References:
    """Samples that the model answers right, and their pathways.

    Attributes:
        items: the samples.
        embeddings: fp32, (samples, hidden): mean input embedding of each prompt's tokens.
        pathways: fp32, (samples, layers, experts): router probabilities of each prompt's last
            token.
        layers: decoder layers of the pathways, ascending.
    """

    items: tuple[Item, ...]
    embeddings: Tensor
    pathways: Tensor
    layers: tuple[int, ...]


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
    last_layers: int | None = None,
    tasks: Sequence[str] = TASKS,
    spare: float = SPARE,
) -> References:
    """Draw training items and keep the first of each task that greedy decoding answers exactly.

    Args:
        model: in fp32, in evaluation mode.
        seed: of the draw.
        per_task: references of each task.
        last_layers: how many layers, counted from the end, a pathway has; None is all.
        tasks: that they are drawn from.
        spare: items drawn for each reference wanted, at least 1.

    Raises:
        ValueError: the model answers too few items of a task.
    """
    routers = softmax_routers(model)
    layers = tuple(routers)[-(last_layers or len(routers)) :]
    kept: list[Item] = []
    embeddings: list[Tensor] = []
    pathways: list[Tensor] = []
    for task in tasks:
        items = distinct(task, "train", seed, math.ceil(spare * per_task))
        batch = SampleBatch.of([encoded(item) for item in items])
        with recorded_scores({layer: routers[layer] for layer in layers}) as scores:
            right = batch.exact(batch.answer_logits(model)).nonzero().flatten()[:per_task]
        if len(right) < per_task:
            raise ValueError(f"task {task!r}: {len(right)} right answers, {per_task} wanted")
        inputs = model.get_input_embeddings()(batch.ids)
        kept += [items[index] for index in right.tolist()]
        embeddings += [prompt_embedding(inputs[index, batch.prompts[index]]) for index in right]
        pathways.append(torch.stack([scores[layer][batch.last[right]] for layer in layers], 1))
    return References(tuple(kept), torch.stack(embeddings), torch.cat(pathways), layers)


def write_references(folder: Path, references: References, name: str = SET_NAME) -> Profile:
    """Make these references the one set of a profile; its other parts stay as they are.

    Args:
        folder: of a profile.
        references: kept in fp16.
        name: of the set.

    Raises:
        ProfileError: the folder holds no profile.
    """
    profile = Profile.load(folder)
    fields = profile.fields.model_dump(exclude={"schema_version", "files", "digest"})
    fields["references"] = {
        name: {"layers": references.layers, "width": references.embeddings.size(1)}
    }
    heads = {
        f"{method}.{part}": tensor
        for method in sorted(profile.methods)
        for part, tensor in profile.tensors(method).items()
    }
    tensors = {"embeddings": references.embeddings, "pathways": references.pathways}
    halves = {f"{name}.{part}": tensor.half() for part, tensor in tensors.items()}
    write_profile(folder, fields, heads, halves)
    return Profile.load(folder)
