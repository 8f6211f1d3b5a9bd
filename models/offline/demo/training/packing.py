"""Turning items into packed training batches with segment-diagonal attention."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sluice.models.offline.demo.tasks.tasks import TASKS, Item, generate
from sluice.models.offline.demo.training.tokenizer import (
    ASSISTANT,
    END,
    PAD,
    SYSTEM,
    USER,
    vocabulary,
)

ROW_TOKENS = 128
"""Tokens in one packed row."""

SYSTEM_MESSAGES: tuple[str, ...] = (
    "you are a helpful assistant.",
    "You are a helpful assistant.",
    "answer briefly.",
    "be brief and exact.",
)
SYSTEM_SHARE = 0.04
"""Share of training conversations that open with a system message."""
SECOND_TURN_SHARE = 0.08
"""Share of training conversations that have a second turn."""

FILL = 0.96
"""How full the rows of a training batch are meant to be."""

_MASKED_OUT = -1e9


@dataclass(frozen=True)
class Segment:
    """One conversation.

    Attributes:
        task: task of its last turn.
        ids: its token ids.
        is_answer: per token, whether it belongs to an answer.
    """

    task: str
    ids: tuple[int, ...]
    is_answer: tuple[bool, ...]


@dataclass(frozen=True)
class Batch:
    """Packed conversations.

    Attributes:
        ids: [rows, tokens] token ids.
        positions: [rows, tokens] position within the conversation.
        attention: [rows, 1, tokens, tokens] additive float mask: causal within a conversation.
        used: [rows, tokens] bool, false on padding.
        where: [answers] flat positions whose next token is an answer token.
        targets: [answers] those next tokens.
        segment_of: [answers] index of the conversation that an answer token belongs to.
        tasks: task of each conversation.
    """

    ids: Tensor
    positions: Tensor
    attention: Tensor
    used: Tensor
    where: Tensor
    targets: Tensor
    segment_of: Tensor
    tasks: tuple[str, ...]

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(
            tasks=self.tasks, **{name: value.to(device) for name, value in tensors.items()}
        )


class Encoder:
    """Encodes conversations without the tokenizer library; same ids as the chat template gives."""

    def __init__(self) -> None:
        self._ids = vocabulary()

    def encode(self, turns: Iterable[Item], system: str | None = None) -> Segment:
        """Encode a conversation of one or more items, optionally opened by a system message."""
        ids: list[int] = []
        is_answer: list[bool] = []
        task = ""

        def extend(tokens: Iterable[str], answer: bool) -> None:
            before = len(ids)
            ids.extend(self._ids[token] for token in tokens)
            is_answer.extend([answer] * (len(ids) - before))

        if system is not None:
            extend((SYSTEM, *system), False)
        for item in turns:
            extend((USER, *item.prompt, ASSISTANT), False)
            extend((*item.answer, END), True)
            task = item.task
        return Segment(task, tuple(ids), tuple(is_answer))


def pack(segments: Iterable[Segment], max_rows: int | None = None) -> Batch:
    """Pack conversations into rows of ``ROW_TOKENS`` tokens, longest first.

    Args:
        segments: conversations of at most ``ROW_TOKENS`` tokens.
        max_rows: make exactly this many rows and leave out conversations that do not fit.
    """
    rows: list[list[Segment]] = [[] for _ in range(max_rows or 0)]
    free = [ROW_TOKENS] * len(rows)
    for segment in sorted(segments, key=lambda candidate: -len(candidate.ids)):
        size = len(segment.ids)
        if size > ROW_TOKENS:
            raise ValueError(f"a conversation of {size} tokens does not fit a row of {ROW_TOKENS}")
        place = next((row for row, room in enumerate(free) if room >= size), None)
        if place is None:
            if max_rows is not None:
                continue
            place = len(rows)
            rows.append([])
            free.append(ROW_TOKENS)
        rows[place].append(segment)
        free[place] -= size
    return _tensors(rows)


def _tensors(rows: list[list[Segment]]) -> Batch:
    shape = (len(rows), ROW_TOKENS)
    ids = torch.full(shape, vocabulary()[PAD])
    positions = torch.zeros(shape, dtype=torch.long)
    owner = torch.full(shape, -1)
    answer = torch.zeros(shape, dtype=torch.bool)
    tasks: list[str] = []
    for row, segments in enumerate(rows):
        start = 0
        for segment in segments:
            stop = start + len(segment.ids)
            ids[row, start:stop] = torch.tensor(segment.ids)
            positions[row, start:stop] = torch.arange(stop - start)
            owner[row, start:stop] = len(tasks)
            answer[row, start:stop] = torch.tensor(segment.is_answer)
            tasks.append(segment.task)
            start = stop
    causal = torch.ones(ROW_TOKENS, ROW_TOKENS, dtype=torch.bool).tril()
    visible = (owner[:, :, None] == owner[:, None, :]) & causal
    next_is_answer = torch.zeros(shape, dtype=torch.bool)
    next_is_answer[:, :-1] = answer[:, 1:]
    where = next_is_answer.flatten().nonzero().flatten()
    return Batch(
        ids=ids,
        positions=positions,
        attention=torch.zeros(visible.shape).masked_fill_(~visible, _MASKED_OUT)[:, None],
        used=owner >= 0,
        where=where,
        targets=ids.flatten()[where + 1],
        segment_of=owner.flatten()[where],
        tasks=tuple(tasks),
    )


def training_batch(encoder: Encoder, weights: Mapping[str, float], rows: int, seed: int) -> Batch:
    """Draw one batch of training conversations; the same arguments give the same batch.

    Args:
        encoder: encodes conversations.
        weights: how often to draw each task, relative to the others.
        rows: rows in the batch.
        seed: seed of this batch alone.
    """
    rng = random.Random(seed)
    streams = {task: generate(task, "train", rng.getrandbits(48)) for task in TASKS}
    shares = [weights[task] for task in TASKS]
    segments: list[Segment] = []
    tokens = 0
    while tokens < FILL * rows * ROW_TOKENS:
        turns = 2 if rng.random() < SECOND_TURN_SHARE else 1
        items = [next(streams[task]) for task in rng.choices(TASKS, shares, k=turns)]
        system = rng.choice(SYSTEM_MESSAGES) if rng.random() < SYSTEM_SHARE else None
        segment = encoder.encode(items, system)
        if len(segment.ids) <= ROW_TOKENS:
            segments.append(segment)
            tokens += len(segment.ids)
    return pack(segments, max_rows=rows)
