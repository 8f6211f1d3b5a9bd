"""Machine code that is kept must not outlive any source that went into it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONSTANTS = """
MORE = {more}
"""
CALLED = """
from constants import MORE
from sluice.kernels.cpu.jit import compiled

@compiled
def called(x):
    return x + MORE + {more}
"""
CALLER = """
from called import called
from sluice.kernels.cpu.jit import compiled

@compiled
def caller(x):
    return called(x)

print(caller(1), sum(caller.stats.cache_hits.values()))
"""


@pytest.mark.parametrize("changed", ["cpu/called.py", "ops/constants.py"])
def test_kept_code_goes_with_the_modules_beside_it_and_their_constants(
    tmp_path: Path, changed: str
) -> None:
    sources = {"cpu/called.py": CALLED, "ops/constants.py": CONSTANTS}
    for name, source in {**sources, "cpu/caller.py": CALLER}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source.format(more=1))

    def run(more: int) -> list[str]:
        source = sources[changed].format(more=more)
        if (tmp_path / changed).read_text() != source:
            (tmp_path / changed).write_text(source)
        environment = {
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(tmp_path / "ops"),
        }
        answer = subprocess.run(
            [sys.executable, "caller.py"],
            cwd=tmp_path / "cpu",
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return answer.stdout.split()

    assert run(1) == ["3", "0"]
    assert run(1) == ["3", "1"]
    assert run(20) == ["22", "0"]
