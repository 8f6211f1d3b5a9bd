"""Fixtures for all tests. The environment is set before anything imports vLLM."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# A K/V slot read before it was written shows in the tokens of every test.
os.environ["SLUICE_POISON_KV"] = "1"
# Engines of these tests live in this process; servers are started as a user starts them.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# `make test-v2` runs a part of the tests on vLLM's other model runner.
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")

# A thread for each of the processes that tests run in; a second would wait for another's core.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")

# Triton kernels are checked through its interpreter, which must be chosen before the import.
os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
    from support.interpreter import stand_in_for_a_backend

    stand_in_for_a_backend()


def pytest_configure() -> None:
    """Refuse to run on an installation with an earlier name: its entry points may differ."""
    try:
        version("vllm-sluice")
    except PackageNotFoundError:
        install = "pip install --no-deps --no-build-isolation --editable ."
        pytest.exit(f"vllm-sluice is not installed: run make, or .venv/bin/{install}", 2)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from support.schedule import rank, slow

    items.sort(key=lambda item: rank(item.path.relative_to(ROOT)))
    for item in items:
        if slow(item.path.relative_to(ROOT)):
            item.add_marker("slow")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from support.schedule import Schedule

    return Schedule(config, log)


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def choosing(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Sets the variable that chooses implementations, which is read once."""
    from sluice.kernels import dispatch

    dispatch.chosen.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    dispatch.chosen.cache_clear()
