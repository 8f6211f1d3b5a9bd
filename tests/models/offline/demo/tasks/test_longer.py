"""Items of lengths that training never has, with right answers."""

import pytest

from sluice.models.offline.demo.tasks.tasks import (
    LONGER_TASKS,
    UnknownTaskError,
    distinct,
    longer_items,
)


@pytest.mark.parametrize("task", LONGER_TASKS)
def test_every_item_is_longer_than_any_of_the_task(task: str) -> None:
    items = longer_items(task, seed=1, count=60)
    assert len({item.prompt for item in items}) == 60
    assert items == longer_items(task, seed=1, count=60)
    assert items != longer_items(task, seed=2, count=60)

    def size(prompt: str) -> int:
        _, *words = prompt.split()
        return len(words) if task != "count" else len(words[-1])

    def fixed(prompt: str) -> int:
        # `lookup` asks for one to four keys in one word; the pairs before it are what is longer.
        return size(prompt) - 1

    longest = max(fixed(item.prompt) for item in distinct(task, "train", 1, 200))
    assert min(fixed(item.prompt) for item in items) > longest


def test_answers_are_right() -> None:
    def words(task: str) -> list[tuple[list[str], str]]:
        return [(item.prompt.split()[1:], item.answer) for item in longer_items(task, 3, 40)]

    assert all(answer == max(numbers) for numbers, answer in words("max"))
    assert all(answer == str(word.count(name)) for (name, _, word), answer in words("count"))
    for (*pairs, wanted), answer in words("recall"):
        assert f"{wanted}{answer}" in pairs
    for (*pairs, keys), answer in words("lookup"):
        assert [pair[0] for pair in answer.split()] == list(keys)
        assert set(answer.split()) <= set(pairs)


def test_tasks_without_a_longer_form() -> None:
    with pytest.raises(UnknownTaskError, match="no longer form of 'copy'"):
        longer_items("copy", 1, 1)
