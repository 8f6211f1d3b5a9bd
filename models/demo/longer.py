"""Demo tasks with contents longer than any trained on, of which the model answers about half.

For comparing policies where the tasks themselves leave no room: the shipped model answers nearly
all of those. No training prompt has these lengths, so every item is a held-out one. The tasks that
give a whole word back (`copy`, `sort`, ...) are not here: beyond their trained lengths the model
answers none.
"""

import random
import string
from collections.abc import Callable

from sluice.models.demo.tasks import Item, UnknownTaskError

_NAMES = "abcdefghij"


def _max(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(5, 6))]
    return f"max {' '.join(map(str, numbers))}", str(max(numbers))


def _count(rng: random.Random) -> tuple[str, str]:
    wanted, *others = rng.sample(_NAMES, 3)
    word = "".join(rng.choices([wanted, *others], weights=[2, 1, 1], k=rng.randint(8, 9)))
    return f"count {wanted} in {word}", str(word.count(wanted))


def _pairs(rng: random.Random) -> dict[str, str]:
    keys = rng.sample(_NAMES, rng.randint(5, 6))
    return dict(zip(keys, rng.choices(string.digits, k=len(keys)), strict=True))


def _lookup(rng: random.Random) -> tuple[str, str]:
    pairs = _pairs(rng)
    wanted = rng.sample(list(pairs), rng.randint(1, 4))
    known = " ".join(key + value for key, value in pairs.items())
    return f"lookup {known} {''.join(wanted)}", " ".join(key + pairs[key] for key in wanted)


def _recall(rng: random.Random) -> tuple[str, str]:
    pairs = _pairs(rng)
    wanted = rng.choice(list(pairs))
    known = " ".join(key + value for key, value in pairs.items())
    return f"recall {known} {wanted}", pairs[wanted]


_MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "max": _max,
    "count": _count,
    "lookup": _lookup,
    "recall": _recall,
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
