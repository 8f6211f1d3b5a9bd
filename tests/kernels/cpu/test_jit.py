"""Machine code that is kept must not outlive any source that went into it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CALLED = """
from sluice.kernels.cpu.jit import compiled

@compiled
def called(x):
    return x + {more}
"""
CALLER = """
from called import called
from sluice.kernels.cpu.jit import compiled

@compiled
def caller(x):
    return called(x)

print(caller(1), sum(caller.stats.cache_hits.values()))
"""


def test_kept_code_goes_with_any_module_beside_it(tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text(CALLER)

    def run(more: int) -> list[str]:
        source = CALLED.format(more=more)
        if not (tmp_path / "called.py").exists() or (tmp_path / "called.py").read_text() != source:
            (tmp_path / "called.py").write_text(source)
        command = [sys.executable, "caller.py"]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        answer = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return answer.stdout.split()

    assert run(1) == ["2", "0"]
    assert run(1) == ["2", "1"]
    assert run(20) == ["21", "0"]
