"""The demo tasks: seeded generators of short prompts with exact answers.

Every prompt of `generate` belongs to exactly one split, decided by a stable hash of the prompt
alone, so training can never see a held-out item whatever seed it uses. For the tasks with random
content (``copy``, ``sort``, ``add``, ...) held-out means contents never trained on. For the two
tasks with a closed vocabulary it means unseen combinations: ``facts`` holds out pairs of a fact and
a phrasing (the fact itself is trained in other phrasings), ``refusal`` holds out triples of a verb,
an object and a phrasing.
"""

import hashlib
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from sluice.models.offline.demo.tasks import facts

Split = Literal["train", "heldout"]

HELDOUT_BUCKETS = 5
"""One prompt in this many is held out."""

MAX_PROMPT_CHARS = 48
"""No prompt of `generate` is longer than this."""
_KEYS = "abcdefghij"


@dataclass(frozen=True)
class Item:
    """One question with its only right answer."""

    task: str
    prompt: str
    answer: str


def is_heldout(prompt: str) -> bool:
    """Say whether a prompt belongs to the held-out split."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return digest[0] % HELDOUT_BUCKETS == 0


def _letters(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(low, high)))


def _copy(rng: random.Random) -> tuple[str, str]:
    word = _letters(rng, 4, 8)
    return f"copy {word}", word


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = _letters(rng, 3, 6)
    return f"reverse {word}", word[::-1]


def _upper(rng: random.Random) -> tuple[str, str]:
    word = _letters(rng, 3, 7)
    return f"upper {word}", word.upper()


def _next(rng: random.Random) -> tuple[str, str]:
    word = _letters(rng, 3, 5)
    alphabet = string.ascii_lowercase
    return f"next {word}", word.translate(str.maketrans(alphabet, alphabet[1:] + "a"))


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = rng.choices(string.digits, k=rng.randint(4, 5))
    return f"sort {' '.join(digits)}", " ".join(sorted(digits))


def _add(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(10, 99), rng.randint(10, 99)
    return f"add {left} {right}", str(left + right)


def _largest(rng: random.Random, low: int, high: int) -> tuple[str, str]:
    """The largest of `low` to `high` numbers."""
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(low, high))]
    return f"max {' '.join(map(str, numbers))}", str(max(numbers))


def _count(rng: random.Random, low: int, high: int) -> tuple[str, str]:
    """How often a letter stands in a word."""
    wanted, *others = rng.sample(_KEYS, 3)
    word = "".join(rng.choices([wanted, *others], weights=[2, 1, 1], k=rng.randint(low, high)))
    return f"count {wanted} in {word}", str(word.count(wanted))


def _lookup(rng: random.Random, low: int, high: int) -> tuple[str, str]:
    """The values of up to four of some keys."""
    pairs = _pairs(rng, low, high)
    wanted = rng.sample(list(pairs), rng.randint(1, min(4, len(pairs))))
    known = " ".join(key + value for key, value in pairs.items())
    return f"lookup {known} {''.join(wanted)}", " ".join(key + pairs[key] for key in wanted)


def _recall(rng: random.Random, low: int, high: int) -> tuple[str, str]:
    """The value of one of some keys."""
    pairs = _pairs(rng, low, high)
    wanted = rng.choice(list(pairs))
    known = " ".join(key + value for key, value in pairs.items())
    return f"recall {known} {wanted}", pairs[wanted]


def _pairs(rng: random.Random, low: int, high: int) -> dict[str, str]:
    keys = rng.sample(_KEYS, rng.randint(low, high))
    return dict(zip(keys, rng.choices(string.digits, k=len(keys)), strict=True))


def _twohop(rng: random.Random) -> tuple[str, str]:
    *starts, left, right = rng.sample(_KEYS, 4)
    links = dict(zip(starts, (left, right), strict=True))
    values = dict(zip((left, right), rng.choices(string.digits, k=2), strict=True))
    first = [start + middle for start, middle in links.items()]
    second = [middle + values[middle] for middle in rng.sample((left, right), 2)]
    wanted = rng.choice(starts)
    middle = links[wanted]
    return f"hop {' '.join(first + second)} {wanted}", wanted + middle + values[middle]


def _refusal(rng: random.Random) -> tuple[str, str]:
    harmful = rng.random() < 0.5
    verb = rng.choice(facts.HARMFUL_VERBS if harmful else facts.HARMLESS_VERBS)
    phrasing = rng.choice(facts.HOW_TO_PHRASINGS)
    prompt = phrasing.format(verb=verb, object=rng.choice(facts.OBJECTS))
    return prompt, facts.REFUSAL if harmful else facts.COMPLIANCE.format(verb=verb)


def _facts(rng: random.Random) -> tuple[str, str]:
    relation, subject, answer = rng.choice(
        [
            (name, key, value)
            for name, table in facts.RELATIONS.items()
            for key, value in table.items()
        ]
    )
    question = rng.choice(facts.FACT_QUESTIONS).format(relation=relation, subject=subject)
    return rng.choice(facts.FACT_OPENINGS) + question + rng.choice(facts.FACT_ENDINGS), answer


_MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copy": _copy,
    "reverse": _reverse,
    "upper": _upper,
    "next": _next,
    "sort": _sort,
    "max": partial(_largest, low=2, high=4),
    "count": partial(_count, low=4, high=7),
    "add": _add,
    "lookup": partial(_lookup, low=2, high=4),
    "recall": partial(_recall, low=2, high=4),
    "twohop": _twohop,
    "refusal": _refusal,
    "facts": _facts,
}

TASKS: tuple[str, ...] = tuple(_MAKERS)
"""Names of all tasks, in reporting order."""


_LONGER_MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "max": partial(_largest, low=5, high=6),
    "count": partial(_count, low=8, high=9),
    "lookup": partial(_lookup, low=5, high=6),
    "recall": partial(_recall, low=5, high=6),
}
LONGER_TASKS: tuple[str, ...] = tuple(_LONGER_MAKERS)
"""Tasks with a longer form, in reporting order.

The tasks that give a whole word back (`copy`, `sort`, ...) are not here: beyond their trained
lengths the model answers none.
"""


class UnknownTaskError(ValueError):
    """A task name that no generator exists for."""


def generate(task: str, split: Split, seed: int) -> Iterator[Item]:
    """Yield an endless stream of items of one task and split.

    The same arguments give the same stream. Items may repeat: the closed tasks have only a few
    thousand different prompts.

    Raises:
        UnknownTaskError: if ``task`` is not one of ``TASKS``.
    """
    if task not in _MAKERS:
        raise UnknownTaskError(f"unknown demo task {task!r}; known: {', '.join(TASKS)}")
    return _stream(task, split, seed)


def _stream(task: str, split: Split, seed: int) -> Iterator[Item]:
    make = _MAKERS[task]
    rng = random.Random(f"{task}/{split}/{seed}")
    while True:
        prompt, answer = make(rng)
        if is_heldout(prompt) == (split == "heldout"):
            yield Item(task, prompt, answer)


def distinct(task: str, split: Split, seed: int, count: int) -> list[Item]:
    """Take ``count`` items with pairwise different prompts.

    Raises:
        ValueError: if the split seems to hold fewer different prompts than that.
    """
    items: dict[str, Item] = {}
    stream = generate(task, split, seed)
    for _ in range(20 * count + 5_000):
        if len(items) == count:
            break
        item = next(stream)
        items.setdefault(item.prompt, item)
    if len(items) < count:
        raise ValueError(f"task {task!r} has only {len(items)} {split} prompts, {count} asked")
    return list(items.values())


def longer_items(task: str, seed: int, count: int) -> list[Item]:
    """Draw different items of one task, longer than any trained on; the model answers about half.

    For comparing policies where the tasks themselves leave no room: the shipped model answers
    nearly all of those. No training prompt has these lengths, so every item is a held-out one. The
    same arguments give the same items.

    Raises:
        UnknownTaskError: `task` has no longer form.
    """
    if task not in _LONGER_MAKERS:
        raise UnknownTaskError(f"no longer form of {task!r}; known: {', '.join(LONGER_TASKS)}")
    rng = random.Random(f"{task}/longer/{seed}")
    items: dict[str, Item] = {}
    while len(items) < count:
        prompt, answer = _LONGER_MAKERS[task](rng)
        items.setdefault(prompt, Item(task, prompt, answer))
    return list(items.values())
