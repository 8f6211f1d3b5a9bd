"""`sluice calibrate`: measure a model, train its heads, and write a profile."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sluice.server.cli.extras import require_vllm
from sluice.server.cli.parser import STOPPED_STATUS, OneLineParser
from sluice.server.cli.progress import Progress

if TYPE_CHECKING:
    from sluice.models.offline.calibrate.step import Calibration, Step


def main(argv: list[str]) -> None:
    """Run `sluice calibrate [STEP] MODEL ...`.

    Raises:
        SystemExit: 2 for arguments, examples or a model that do not fit, 1 for a file that cannot
            be written, 130 for Ctrl-C, 143 for SIGTERM.
    """
    require_vllm("sluice calibrate")
    from sluice.models.offline.calibrate.registry import QUICK, STEPS
    from sluice.models.offline.hf_model.examples import CalibrationError

    by_name = {step.name: step for step in STEPS}
    named = by_name.get(argv[0]) if argv else None
    quick = named is None and "--quick" in argv
    whole = [step for step in STEPS if not step.only_named]
    offered = [step for step in whole if not quick or step.name in QUICK]
    parser = _parser([named] if named else offered, named, quick=quick)
    args = parser.parse_args(argv[1:] if named else argv)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _run(args, [named] if named else [s for s in offered if s.name not in args.skip], named)
    except CalibrationError as error:
        parser.error(str(error))
    except OSError as error:
        print(f"{parser.prog}: {error}; the results so far are kept", file=sys.stderr)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, _TerminatedError) as stop:
        print("stopped; run the same command again to continue", file=sys.stderr)
        by_signal = isinstance(stop, _TerminatedError)
        raise SystemExit(128 + signal.SIGTERM if by_signal else STOPPED_STATUS) from None


class _TerminatedError(BaseException):
    """The process was asked to end; like Ctrl-C, it is no error that a step may handle."""


def _terminated(*_: Any) -> NoReturn:
    # A second one would cut the clean-up short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _TerminatedError


def _parser(steps: Sequence[type[Step]], named: type[Step] | None, *, quick: bool) -> OneLineParser:
    from sluice.models.offline.calibrate.registry import QUICK, QUICK_NEW_TOKENS, STEPS

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
        default=QUICK_NEW_TOKENS if quick else 48,
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
    parser.add_argument(
        "--enforce-eager",
        action="store_true",
        help="measure speed in an engine that compiles nothing, as `sluice serve --enforce-eager` "
        "runs; by default it compiles, as `sluice serve` does",
    )
    if named is None:
        parser.add_argument(
            "--quick",
            action="store_true",
            help="the order in which layers go, a few points and presets, in minutes: the steps "
            f"{' and '.join(QUICK)}, on a few prompts and tasks",
        )
        parser.add_argument(
            "--skip",
            action="append",
            default=[],
            choices=[step.name for step in STEPS if not step.only_named],
            help="leave this step out; may be given several times",
        )
    for step in steps:
        group = parser.add_argument_group(f"step {step.name}", step.help)
        defaults = QUICK[step.name] if quick else {}
        for each in fields(step):
            default = defaults.get(each.name, each.default)
            _add_option(group, step, each, default, prefixed=named is None)
    return parser


def _add_option(group: Any, step: type[Step], option: Any, default: Any, *, prefixed: bool) -> None:
    name = option.name.replace("_", "-")
    flag = f"--{step.name}-{name}" if prefixed else f"--{name}"
    kind = type(option.default)
    help_text = f"{option.metadata['help']} (default: {default!r})"
    shared = {"dest": _place(step, option.name), "default": default, "help": help_text}
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
    else:
        group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **shared)


def _place(step: type[Step], option: str) -> str:
    return f"{step.name}/{option}"


def _run(args: argparse.Namespace, kinds: Sequence[type[Step]], named: type[Step] | None) -> None:
    from rich.console import Console

    from sluice.models.offline.calibrate.estimate import estimate, in_words
    from sluice.models.offline.calibrate.pipeline import open_workspace, run_steps
    from sluice.models.offline.hf_model.examples import CalibrationError
    from sluice.models.offline.report.frontier import TABLE_WIDTH, frontier_table, verdict

    if args.new_tokens < 1:
        raise CalibrationError("--new-tokens must be at least 1")
    steps = [
        kind(**{each.name: vars(args)[_place(kind, each.name)] for each in fields(kind)})
        for kind in kinds
    ]
    console = Console(stderr=True)
    say = partial(console.print, markup=False, soft_wrap=True)
    progress = Progress(console)
    calibration = _calibration(args, progress)
    with progress:
        open_workspace(calibration, args.out)
        _add_earlier_parts(calibration, named)
        if named:
            steps[0].check(calibration)
        else:
            steps = _able(steps, calibration, say)
            if not all(calibration.workspace.latest_part(step.name) for step in steps):
                say(in_words(estimate(calibration, steps)))
        profile = run_steps(calibration, steps, args.out, say)
    if profile.frontier is not None:
        from sluice.models.offline.report.charts import write_plots

        write_plots(profile.frontier, args.out)
        # In a narrower terminal names would vanish; it wraps lines by itself.
        Console(width=max(Console().width, TABLE_WIDTH)).print(frontier_table(profile.frontier))
        say(verdict(profile.frontier))
    say(f"wrote {args.out}")


def _able(
    steps: Sequence[Step], calibration: Calibration, say: Callable[[str], None]
) -> list[Step]:
    """The steps that can run here; for each of the others, a line says why it cannot."""
    refusals = {step: step.refusal(calibration) for step in steps}
    for step, refusal in refusals.items():
        if refusal is not None:
            say(f"{step.name}: skipped: {refusal}")
            calibration.skipped[step.name] = refusal
    return [step for step, refusal in refusals.items() if refusal is None]


def _calibration(args: argparse.Namespace, progress: Progress) -> Calibration:
    import torch

    from sluice.models.offline.calibrate.registry import QUICK_PROMPTS
    from sluice.models.offline.calibrate.step import Calibration
    from sluice.models.offline.calibrate.workspace import Workspace
    from sluice.models.offline.hf_model.examples import (
        CalibrationError,
        read_examples,
        read_tasks,
        spaced_indices,
    )
    from sluice.models.offline.hf_model.model import HFModel

    prompts = read_examples(args.prompts)
    if getattr(args, "quick", False):
        prompts = tuple(prompts[n] for n in spaced_indices(QUICK_PROMPTS, len(prompts)))
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
        track=progress.track,
        eager=args.enforce_eager,
    )


def _add_earlier_parts(calibration: Calibration, named: type[Step] | None) -> None:
    """Add the latest results of the other steps, in a whole run of those that are no part of it."""
    from sluice.models.offline.calibrate.registry import STEPS

    for step in STEPS:
        others = step.only_named if named is None else step is not named
        part = calibration.workspace.latest_part(step.name) if others else None
        if part is not None:
            calibration.parts[step.name] = part
