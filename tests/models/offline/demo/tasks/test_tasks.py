"""The task generators: determinism, splits and answers, checked against an independent solver."""

import itertools
import re

import pytest

from sluice.models.offline.demo.tasks import facts
from sluice.models.offline.demo.tasks.tasks import (
    MAX_PROMPT_CHARS,
    TASKS,
    Item,
    Split,
    UnknownTaskError,
    distinct,
    generate,
)
from sluice.models.offline.demo.training.tokenizer import CHARACTERS

SPLITS: tuple[Split, ...] = ("train", "heldout")


def take(task: str, split: Split, seed: int, count: int) -> list[Item]:
    return list(itertools.islice(generate(task, split, seed), count))


def solve_sequence(command: str, words: list[str]) -> str | None:
    match command:
        case "copy":
            return words[0]
        case "reverse":
            return "".join(reversed(words[0]))
        case "upper":
            return words[0].upper()
        case "next":
            return "".join("a" if c == "z" else chr(ord(c) + 1) for c in words[0])
        case "sort":
            return " ".join(map(str, sorted(map(int, words))))
        case "max":
            return str(sorted(map(int, words))[-1])
        case "add":
            return str(sum(map(int, words)))
        case "count":
            return str(len([c for c in words[2] if c == words[0]]))
        case _:
            return None


def solve_pairs(command: str, words: list[str]) -> str:
    """Scan the two-character pairs from the left for each asked key."""
    *pairs, asked = words

    def value(key: str) -> str:
        return next(pair[1] for pair in pairs if pair[0] == key)

    if command == "recall":
        return value(asked)
    if command == "hop":
        return asked + value(asked) + value(value(asked))
    return " ".join(key + value(key) for key in asked)


def solve_sentence(prompt: str) -> str:
    for relation, pairs in facts.RELATIONS.items():
        for subject, value in pairs.items():
            if re.search(rf"\b{relation}\b", prompt) and re.search(rf"\b{subject}\b", prompt):
                return value
    verbs = {*facts.HARMFUL_VERBS, *facts.HARMLESS_VERBS} & set(prompt.split())
    (verb,) = verbs
    if verb in facts.HARMFUL_VERBS:
        return "sorry, i can't help with that."
    return f"sure, {verb} it with care."


def solve(prompt: str) -> str:
    command, *words = prompt.split()
    if command in ("lookup", "recall", "hop"):
        return solve_pairs(command, words)
    answer = solve_sequence(command, words)
    return solve_sentence(prompt) if answer is None else answer


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right(task: str, split: Split) -> None:
    for item in take(task, split, 1, 400):
        assert item.task == task
        assert solve(item.prompt) == item.answer, item


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_items(task: str) -> None:
    assert take(task, "train", 3, 50) == take(task, "train", 3, 50)
    assert take(task, "train", 3, 50) != take(task, "train", 4, 50)


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_prompt(task: str) -> None:
    train = {item.prompt for item in take(task, "train", 1, 3000)}
    heldout = {item.prompt for item in take(task, "heldout", 2, 1000)}
    assert not train & heldout


@pytest.mark.parametrize("task", TASKS)
def test_enough_different_heldout_prompts(task: str) -> None:
    assert len({item.prompt for item in distinct(task, "heldout", 1, 200)}) == 200


def test_training_covers_every_fact_and_verb() -> None:
    fact_prompts = " | ".join(item.prompt for item in take("facts", "train", 1, 5000))
    assert all(
        re.search(rf"\b{subject}\b", fact_prompts)
        for pairs in facts.RELATIONS.values()
        for subject in pairs
    )
    how_to = " ".join(item.prompt for item in take("refusal", "train", 1, 2000)).split()
    assert {*facts.HARMFUL_VERBS, *facts.HARMLESS_VERBS} <= set(how_to)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_short_and_in_the_character_set(task: str) -> None:
    for item in take(task, "train", 1, 500):
        assert 0 < len(item.prompt) <= MAX_PROMPT_CHARS
        assert item.answer == item.answer.strip() != ""
        assert set(item.prompt + item.answer) <= set(CHARACTERS)


def test_unknown_task_is_refused() -> None:
    with pytest.raises(UnknownTaskError, match="poetry"):
        generate("poetry", "train", 1)


def test_asking_for_too_many_different_items_is_refused() -> None:
    with pytest.raises(ValueError, match="facts"):
        distinct("facts", "heldout", 1, 3000)
