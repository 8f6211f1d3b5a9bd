"""Demo tasks with contents longer than any trained on, of which the model answers about half.

For comparing policies where the tasks themselves leave no room: the shipped model answers nearly
all of those. No training prompt has these lengths, so every item is a held-out one. The tasks that
give a whole word back (`copy`, `sort`, ...) are not here: beyond their trained lengths the model
answers none.
"""

import random
from collections.abc import Callable
from functools import partial

from sluice.models.offline.demo.tasks import sized
from sluice.models.offline.demo.tasks.tasks import Item, UnknownTaskError

_MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "max": partial(sized.largest, low=5, high=6),
    "count": partial(sized.count, low=8, high=9),
    "lookup": partial(sized.lookup, low=5, high=6),
    "recall": partial(sized.recall, low=5, high=6),
}

LONGER_TASKS: tuple[str, ...] = tuple(_MAKERS)
"""Tasks with a longer form, in reporting order."""


def longer_items(task: str, seed: int, count: int) -> list[Item]:
    """Draw different items of one task; the same arguments give the same items.

    Raises:
        UnknownTaskError: `task` has no longer form.
    """
    if task not in _MAKERS:
        raise UnknownTaskError(f"no longer form of {task!r}; known: {', '.join(LONGER_TASKS)}")
    rng = random.Random(f"{task}/longer/{seed}")
    found: dict[str, Item] = {}
    while len(found) < count:
        prompt, answer = _MAKERS[task](rng)
        found.setdefault(prompt, Item(task, prompt, answer))
    return list(found.values())
