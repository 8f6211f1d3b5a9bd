"""`sluice calibrate`: measure a model, train its heads, and write a profile."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.server.cli.extras import require_vllm
from sluice.server.cli.parser import STOPPED_STATUS, OneLineParser

if TYPE_CHECKING:
    from rich.progress import Progress

    from sluice.models.offline.calibrate.step import Calibration, Step


def main(argv: list[str]) -> None:
    """Run `sluice calibrate [STEP] MODEL ...`.

    Raises:
        SystemExit: 2 for arguments, examples or a model that do not fit, 1 for a file that cannot
            be written, 130 for Ctrl-C.
    """
    require_vllm("sluice calibrate")
    from sluice.models.offline.calibrate.registry import STEPS
    from sluice.models.offline.hf_model.examples import CalibrationError

    by_name = {step.name: step for step in STEPS}
    named = by_name.get(argv[0]) if argv else None
    parser = _parser([named] if named else STEPS, named)
    args = parser.parse_args(argv[1:] if named else argv)
    try:
        _run(args, [named] if named else [s for s in STEPS if s.name not in args.skip], named)
    except CalibrationError as error:
        parser.error(str(error))
    except OSError as error:
        print(f"{parser.prog}: {error}; the results so far are kept", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        raise SystemExit(STOPPED_STATUS) from None


def _parser(steps: Sequence[type[Step]], named: type[Step] | None) -> OneLineParser:
    from sluice.models.offline.calibrate.registry import STEPS

    every = "; ".join(f"{step.name}: {step.help}" for step in STEPS)
    parser = OneLineParser(
        prog=f"sluice calibrate {named.name}" if named else "sluice calibrate",
        description=named.help
        if named
        else "Measures a model, trains its exit heads and routers, and writes a profile for "
        f"`sluice serve --profile`. `sluice calibrate STEP MODEL` runs one step. Steps: {every}.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="model folder, or a model name in the Hugging Face cache"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        required=True,
        help="prompts to learn from: each line is a JSON object with `text`, `prompt` or "
        "`messages`, and optionally `answer`, `task` and `label`",
    )
    parser.add_argument(
        "--tasks",
        type=Path,
        metavar="FILE.jsonl",
        help="tasks to measure quality on: the same lines, each with an `answer`; without this "
        "file, quality is agreement with full depth on the prompts",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write the profile to"
    )
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=48,
        metavar="N",
        help="longest answer, in tokens (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="where to run (default: cuda if there is a GPU)"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="data type of the weights; auto takes the checkpoint's (default: %(default)s)",
    )
    if named is None:
        parser.add_argument(
            "--skip",
            action="append",
            default=[],
            choices=[step.name for step in STEPS],
            help="leave this step out; may be given several times",
        )
    for step in steps:
        group = parser.add_argument_group(f"step {step.name}", step.help)
        for each in fields(step):
            _add_option(group, step, each, prefixed=named is None)
    return parser


def _add_option(group: Any, step: type[Step], option: Any, *, prefixed: bool) -> None:
    name = option.name.replace("_", "-")
    flag = f"--{step.name}-{name}" if prefixed else f"--{name}"
    kind = type(option.default)
    help_text = f"{option.metadata['help']} (default: {option.default!r})"
    shared = {"dest": _place(step, option.name), "default": option.default, "help": help_text}
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
    else:
        group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **shared)


def _place(step: type[Step], option: str) -> str:
    return f"{step.name}/{option}"


def _run(args: argparse.Namespace, kinds: Sequence[type[Step]], named: type[Step] | None) -> None:
    from rich.console import Console

    from sluice.models.offline.calibrate.pipeline import open_workspace, run_steps
    from sluice.models.offline.hf_model.examples import CalibrationError
    from sluice.models.offline.report.frontier import TABLE_WIDTH, frontier_table

    if args.new_tokens < 1:
        raise CalibrationError("--new-tokens must be at least 1")
    steps = [
        kind(**{each.name: vars(args)[_place(kind, each.name)] for each in fields(kind)})
        for kind in kinds
    ]
    console = Console(stderr=True)
    say = partial(console.print, markup=False)
    progress = _progress(console)
    calibration = _calibration(args, progress)
    with progress:
        open_workspace(calibration, args.out)
        if named:
            _add_earlier_parts(calibration, named)
            steps[0].check(calibration)
        else:
            steps = _able(steps, calibration, say)
        profile = run_steps(calibration, steps, args.out, say)
    if profile.frontier is not None:
        from sluice.models.offline.report.charts import write_plots

        write_plots(profile.frontier, args.out)
        # In a narrower terminal names would vanish; it wraps lines by itself.
        Console(width=max(Console().width, TABLE_WIDTH)).print(frontier_table(profile.frontier))
    say(f"wrote {args.out}")


def _able(
    steps: Sequence[Step], calibration: Calibration, say: Callable[[str], None]
) -> list[Step]:
    """The steps that can run here; for each of the others, a line says why it cannot."""
    refusals = {step: step.refusal(calibration) for step in steps}
    for step, refusal in refusals.items():
        if refusal is not None:
            say(f"{step.name}: skipped: {refusal}")
    return [step for step, refusal in refusals.items() if refusal is None]


def _calibration(args: argparse.Namespace, progress: Progress) -> Calibration:
    import torch

    from sluice.models.offline.calibrate.step import Calibration
    from sluice.models.offline.calibrate.workspace import Workspace
    from sluice.models.offline.hf_model.examples import CalibrationError, read_examples, read_tasks
    from sluice.models.offline.hf_model.model import HFModel

    prompts = read_examples(args.prompts)
    tasks = read_tasks(args.tasks) if args.tasks else ()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise CalibrationError("--device cuda: this machine has no GPU")
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    return Calibration(
        model=HFModel.of(args.model, device, dtype),
        prompts=prompts,
        tasks=tasks,
        new_tokens=args.new_tokens,
        seed=args.seed,
        workspace=Workspace.beside(args.out),
        track=_tracker(progress),
    )


def _add_earlier_parts(calibration: Calibration, named: type[Step]) -> None:
    """Add the latest results of the other steps."""
    from sluice.models.offline.calibrate.registry import STEPS

    for step in STEPS:
        part = None if step is named else calibration.workspace.latest_part(step.name)
        if part is not None:
            calibration.parts[step.name] = part


def _progress(console: Any) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _tracker(progress: Progress) -> Any:
    def track(things: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        task = progress.add_task(description, total=total or None)
        try:
            for thing in things:
                yield thing
                progress.advance(task)
        finally:  # A step may have seen enough before the end.
            progress.update(task, visible=False)

    return track
