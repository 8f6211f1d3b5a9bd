"""What is asked, drawn by seed: items of the demo model's tasks, or lines of a file."""

from __future__ import annotations

import random
from collections.abc import Iterator

from sluice.loadtest.workload.fields import Prompts
from sluice.models.offline.demo.tasks.tasks import Item, generate


def prompts(fields: Prompts, seed: str) -> Iterator[str]:
    """Yield questions of the mix without end; the same arguments give the same ones.

    With `characters`, solved items come before the question, one a line, until the prompt is at
    least so long.
    """
    if fields.texts:
        rng = random.Random(f"{seed}/file")
        while True:
            yield from rng.sample(fields.texts, len(fields.texts))
    items = _items(fields, seed)
    while True:
        question = next(items).prompt
        if fields.characters is None:
            yield question
            continue
        solved: list[str] = []
        length = len(question)
        while length < fields.characters:
            item = next(items)
            solved.append(f"{item.prompt} {item.answer}")
            length += len(solved[-1]) + 1
        yield "\n".join([*solved, question])


def _items(fields: Prompts, seed: str) -> Iterator[Item]:
    rng = random.Random(f"{seed}/tasks")
    # Streams of their own, so that a task's weight does not change another one's items.
    streams = {
        task: generate(task, fields.split, rng.getrandbits(31)) for task in sorted(fields.tasks)
    }
    names = list(streams)
    weights = [fields.tasks[name] for name in names]
    while True:
        yield next(streams[rng.choices(names, weights)[0]])
