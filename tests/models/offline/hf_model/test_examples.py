"""Prompts and tasks files: what is read, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.models.offline.hf_model.examples import (
    CalibrationError,
    Message,
    digest,
    read_examples,
    read_tasks,
)


def written(folder: Path, *lines: str) -> Path:
    path = folder / "examples.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_what_is_read(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '{"prompt": "two and two?", "answer": "4", "task": "sums", "label": "calm"}',
        "",
        '{"messages": [{"role": "user", "content": "hi"}], "choices": ["a", "b"], "answer": "b"}',
        '{"text": "Once upon"}',
    )
    first, second, third = read_examples(path)
    assert (first.prompt, first.answer, first.task, first.label) == (
        "two and two?",
        "4",
        "sums",
        "calm",
    )
    assert second.messages == (Message(role="user", content="hi"),)
    assert second.choices == ("a", "b")
    assert (third.text, third.answer, third.task) == ("Once upon", None, "all")
    assert [each.where for each in (first, third)] == [f"{path}:1", f"{path}:4"]


def test_the_digest_is_of_what_was_said_in_its_order(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', '{"text": "b"}']
    both = read_examples(written(tmp_path, *lines))
    again = read_examples(written(tmp_path, lines[0], "", lines[1]))
    turned = read_examples(written(tmp_path, *lines[::-1]))
    assert digest(both) == digest(again) != digest(turned)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("[1]", "valid dictionary"),
        ("{}", "one of text, prompt and messages (none given)"),
        ('{"text": "a", "prompt": "b"}', "(text and prompt given)"),
        ('{"text": ""}', "text is empty"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "messages.0.role"),
        ('{"prompt": "a", "anwser": "b"}', "anwser: Extra inputs"),
        ('{"prompt": "a", "answer": ""}', "answer is empty"),
        ('{"prompt": "a", "answer": 4}', "answer: Input should be a valid string"),
        ('{"prompt": "a", "answer": "c", "choices": ["a", "b"]}', "none of the choices"),
        ('{"prompt": "a", "choices": ["a", "b"]}', "none of the choices"),
        ('{"prompt": "a", "answer": "a", "choices": ["a"]}', "two or more"),
        ('{"prompt": "a", "answer": "a", "choices": ["a", "a"]}', "and differ"),
        ('{"prompt": "a", "answer": "a", "choices": ["a", ""]}', "a choice is empty"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = written(tmp_path, '{"text": "fine"}', "", line)
    with pytest.raises(CalibrationError) as refused:
        read_examples(path)
    assert str(refused.value).startswith(f"{path}:3: ")
    assert why in str(refused.value)


def test_files_that_hold_nothing_or_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no examples"):
        read_examples(written(tmp_path, "", " "))
    with pytest.raises(CalibrationError, match="No such file"):
        read_examples(tmp_path / "nowhere.jsonl")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(CalibrationError, match="not UTF-8"):
        read_examples(latin)


def test_a_task_needs_an_answer(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "a", "answer": "b"}', '{"prompt": "a"}')
    assert len(read_examples(path)) == 2
    with pytest.raises(CalibrationError, match=r":2: answer: a task needs one"):
        read_tasks(path)
