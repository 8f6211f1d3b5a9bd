"""Runs steps in order and writes the profile when all of them are done."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sluice.models.offline.calibrate.step import Calibration, Step
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.engine import CalibrationEngine, _flags, _process_kept
from sluice.models.offline.hf_model.examples import CalibrationError, digest
from sluice.models.profile.profile import Profile
from sluice.models.profile.writer import JSON_NAME, write_profile


@contextmanager
def engine_of(calibration: Calibration, longest: int, at_once: int) -> Iterator[CalibrationEngine]:
    """An engine with the profile of the parts so far; the transformers model is let go first.

    Afterwards the process is as it was: environment, random states, threads.

    Args:
        calibration: its model is what the engine serves.
        longest: tokens of a prompt and its answer at most.
        at_once: most requests at a time.

    Raises:
        CalibrationError: two parts give one field.
    """
    model = calibration.model
    model.release()
    gc.collect()
    with tempfile.TemporaryDirectory(prefix="sluice-") as name, _process_kept(Path(name)):
        write_profile(Path(name), **profile_parts(calibration))
        # The environment stands by now: vLLM reads it on import.
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        with ExitStack() as stack:
            stack.callback(cleanup_dist_env_and_memory)
            llm = LLM(str(model.folder), **_flags(model, longest, at_once))
            engine = CalibrationEngine(llm, Profile.load(Path(name)))
            del llm
            stack.callback(engine.close)
            yield engine


_MODEL = "model"
"""Name of the workspace's value that says which model it is of."""


def open_workspace(calibration: Calibration, out: Path) -> None:
    """See that a folder is a new one, or one of the same model's calibrations.

    Args:
        calibration: whose workspace is beside `out`.
        out: folder of the profile.

    Raises:
        CalibrationError: it holds something else.
        OSError: it cannot be written.
    """
    workspace, model = calibration.workspace, calibration.model.fingerprint
    held = workspace.latest(_MODEL)
    if held is None and (out / JSON_NAME).exists():
        raise CalibrationError(
            f"{out} holds a profile, and nothing of the calibration that made it: "
            "choose another folder"
        )
    if held not in (None, model):
        raise CalibrationError(
            f"{out} holds the calibration of the model with fingerprint {held[:12]}, and this "
            f"one's is {model[:12]}: choose another folder"
        )
    workspace.keep(_MODEL, model, model)


def run_steps(
    calibration: Calibration, steps: Sequence[Step], out: Path, say: Callable[[str], None]
) -> Profile:
    """Run what is not done yet, and write the profile.

    Results of other steps that the workspace holds go into the profile as they are.

    Args:
        calibration: what the steps work on.
        steps: in order.
        out: folder of the profile.
        say: told what becomes of each step.

    Raises:
        CalibrationError: a step cannot be done.
        OSError: a file cannot be written; what was done before is kept.
    """
    for step in steps:
        key = calibration.key(step)
        part = calibration.workspace.part(step.name, key)
        if part is None:
            say(f"{step.name}: {step.help}")
            part = step.run(calibration)
            record = {"settings": step.settings, **_record(calibration, step), "key": key}
            part = Part(
                {**part.fields, "calibration": {step.name: record}}, part.heads, part.references
            )
            calibration.workspace.keep_part(step.name, key, part)
        else:
            say(f"{step.name}: done before")
        calibration.parts[step.name] = part
    write_profile(out, **profile_parts(calibration))
    return Profile.load(out)


def profile_parts(calibration: Calibration) -> dict[str, Any]:
    """What `write_profile` takes, of the parts so far.

    Raises:
        CalibrationError: two parts give one field.
    """
    model = calibration.model
    fields: dict[str, Any] = {
        "model": {
            "layers": model.layers,
            "hidden": model.hidden,
            "fingerprint": model.fingerprint,
        },
        "calibration": {},
    }
    heads: dict[str, Any] = {}
    references: dict[str, Any] = {}
    for name, part in calibration.parts.items():
        own = dict(part.fields)
        fields["calibration"] |= own.pop("calibration", {})
        twice = (fields.keys() & own.keys()) | (heads.keys() & part.heads.keys())
        if twice:
            raise CalibrationError(f"step {name}: {', '.join(sorted(twice))} was given before")
        fields |= own
        heads |= part.heads
        references |= part.references
    return {"fields": fields, "heads": heads, "references": references}


def _record(calibration: Calibration, step: Step) -> dict[str, Any]:
    examples = calibration.prompts + (calibration.tasks if step.reads_tasks else ())
    return {"examples": len(examples), "data": digest(examples)}
