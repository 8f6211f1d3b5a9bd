"""The worker refuses a model runner that would ignore our hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.engine import engine
from support.tiny import make_model

from sluice.models.engine.workers.base import RunnerNotAttachedError


def test_a_runner_that_is_not_ours_is_refused_by_name(models_folder: Path) -> None:
    folder = make_model("llama", models_folder / "worker")
    with (
        pytest.raises(RunnerNotAttachedError, match=r"CPUModelRunner, which Sluice"),
        engine(folder, "support.unattached.UnattachedWorker"),
    ):
        pass
