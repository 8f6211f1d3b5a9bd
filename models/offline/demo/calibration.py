"""The demo model's prompts and tasks as `sluice calibrate` reads them.

``python -m sluice.models.offline.demo.calibration --prompts FILE --tasks FILE``. Everything is of
the training split; no item is in both files, and tasks take turns, so that the first lines have
all.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sluice.models.offline.demo.tasks import facts
from sluice.models.offline.demo.tasks.tasks import TASKS, Item, distinct

REFUSED, ANSWERED = "refused", "answered"
"""Labels of the prompts: what the right answer does."""

PROMPTS_PER_TASK = 125
TASKS_PER_TASK = 40


def draw(seed: int, prompts: int, tasks: int) -> tuple[list[Item], list[Item]]:
    """Draw items for the two files, the same number of every task.

    Args:
        seed: of the draw.
        prompts: items per task to calibrate on.
        tasks: items per task to measure quality on.
    """
    drawn = [distinct(task, "train", seed, prompts + tasks) for task in TASKS]
    turns = [item for turn in zip(*drawn, strict=True) for item in turn]
    return turns[: prompts * len(TASKS)], turns[prompts * len(TASKS) :]


def write(path: Path, items: Iterable[Item]) -> None:
    """Write items as JSON lines."""
    lines = [json.dumps(_line(item)) for item in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(item: Item) -> dict[str, Any]:
    label = REFUSED if item.answer == facts.REFUSAL else ANSWERED
    return {"prompt": item.prompt, "answer": item.answer, "task": item.task, "label": label}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sluice.models.offline.demo.calibration", description=__doc__
    )
    parser.add_argument("--prompts", type=Path, required=True, help="file to write")
    parser.add_argument("--tasks", type=Path, required=True, help="file to write")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--prompts-per-task", type=int, default=PROMPTS_PER_TASK)
    parser.add_argument("--tasks-per-task", type=int, default=TASKS_PER_TASK)
    arguments = parser.parse_args()
    if min(arguments.prompts_per_task, arguments.tasks_per_task) < 1:
        parser.error("--prompts-per-task and --tasks-per-task must be at least 1")
    prompts, tasks = draw(arguments.seed, arguments.prompts_per_task, arguments.tasks_per_task)
    write(arguments.prompts, prompts)
    write(arguments.tasks, tasks)


if __name__ == "__main__":
    main()
