"""Runs steps in order and writes the profile when all of them are done."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sluice.models.offline.calibrate.measurable import check_measurable
from sluice.models.offline.calibrate.step import Calibration, Step
from sluice.models.offline.calibrate.workspace import Part
from sluice.models.offline.engine import OfflineEngine, offline_engine
from sluice.models.offline.hf_model.examples import CalibrationError, digest
from sluice.models.offline.hf_model.model import HFModel
from sluice.models.offline.provenance import installed_versions
from sluice.models.profile.profile import Profile
from sluice.models.profile.writer import JSON_NAME, write_profile

_BLOCK = 128
"""Tokens of a K/V block at most, of vLLM's defaults."""

_PREFILL_TOKENS = 8192
"""Prompt tokens that a step runs at most, unless a single prompt is longer."""


@contextmanager
def engine_of(calibration: Calibration, longest: int, at_once: int) -> Iterator[OfflineEngine]:
    """An engine with the profile of the parts so far; the transformers model is let go first.

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
    with tempfile.TemporaryDirectory(prefix="sluice-") as name:
        write_profile(Path(name), **profile_parts(calibration))
        with offline_engine(
            model.folder,
            profile=Path(name),
            skip_tokenizer_init=True,
            enforce_eager=calibration.eager,
            dtype=str(model.dtype).removeprefix("torch."),
            # Every prompt runs in full each time it is asked, and is counted.
            enable_prefix_caching=False,
            use_tqdm_on_load=False,
            **_room_for(model, longest, at_once),
        ) as engine:
            yield engine


def _room_for(model: HFModel, longest: int, at_once: int) -> dict[str, Any]:
    """Engine arguments for so many requests of so many tokens, and no more.

    Args:
        model: what is served.
        longest: tokens of a prompt and its answer at most.
        at_once: most requests at a time.
    """
    return {
        "max_model_len": longest,
        "max_num_seqs": at_once,
        "max_num_batched_tokens": max(longest, min(at_once * longest, _PREFILL_TOKENS)),
        "kv_cache_memory_bytes": _kv_cache_bytes(model, longest, at_once),
    }


def _kv_cache_bytes(model: HFModel, longest: int, at_once: int) -> int:
    config = model.config
    dtype = model.dtype if isinstance(model.dtype, torch.dtype) else config.dtype
    latent = getattr(config, "kv_lora_rank", None)
    if latent is not None:
        width = latent + config.qk_rope_head_dim
    else:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = 2 * config.num_key_value_heads * head
    # vLLM keeps one block for itself.
    blocks = at_once * -(-longest // _BLOCK) + 1
    if getattr(config, "sliding_window", None) is not None:
        # Layers with a window have their own blocks, one as large as the others' after rounding.
        blocks *= 2
    size = width * (dtype or torch.float32).itemsize
    return int(blocks * _BLOCK * size * model.layers)


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
        CalibrationError: a step cannot be done, or full depth cannot be measured.
        OSError: a file cannot be written; what was done before is kept.
    """
    if any(step.reads_tasks for step in steps):
        check_measurable(calibration)
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
            "name": model.name,
            "experts": model.has_experts,
        },
        "calibration": {},
        "skipped_steps": dict(calibration.skipped),
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
    return {
        "examples": len(examples),
        "data": digest(examples),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": installed_versions(),
    }
