"""Prompts that come in more than one length, for `tasks` and `longer` to give lengths to.

Each function draws one prompt and its answer; the range of the number of parts includes both ends.
"""

import random
import string

NAMES = "abcdefghij"


def largest(rng: random.Random, low: int, high: int) -> tuple[str, str]:
    """The largest of some numbers (`max`)."""
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(low, high))]
    return f"max {' '.join(map(str, numbers))}", str(max(numbers))


def count(rng: random.Random, low: int, high: int) -> tuple[str, str]:
    """How often a letter stands in a word."""
    wanted, *others = rng.sample(NAMES, 3)
    word = "".join(rng.choices([wanted, *others], weights=[2, 1, 1], k=rng.randint(low, high)))
    return f"count {wanted} in {word}", str(word.count(wanted))


def lookup(rng: random.Random, low: int, high: int) -> tuple[str, str]:
    """The values of up to four of some keys."""
    pairs = _pairs(rng, low, high)
    wanted = rng.sample(list(pairs), rng.randint(1, min(4, len(pairs))))
    known = " ".join(key + value for key, value in pairs.items())
    return f"lookup {known} {''.join(wanted)}", " ".join(key + pairs[key] for key in wanted)


def recall(rng: random.Random, low: int, high: int) -> tuple[str, str]:
    """The value of one of some keys."""
    pairs = _pairs(rng, low, high)
    wanted = rng.choice(list(pairs))
    known = " ".join(key + value for key, value in pairs.items())
    return f"recall {known} {wanted}", pairs[wanted]


def _pairs(rng: random.Random, low: int, high: int) -> dict[str, str]:
    keys = rng.sample(NAMES, rng.randint(low, high))
    return dict(zip(keys, rng.choices(string.digits, k=len(keys)), strict=True))
