"""The wheel and the source distribution, built once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "__pycache__", "*.egg-info", "*-results")
BUILD = "from setuptools import build_meta as b; b.build_sdist({out!r}); b.build_wheel({out!r})"


@dataclass(frozen=True)
class Built:
    """Files of one build, and the copy of the sources that they were built from."""

    source: Path
    wheel: Path
    sdist: Path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    source, out = folder / "source", folder / "out"
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    out.mkdir()
    command = [sys.executable, "-c", BUILD.format(out=str(out))]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return Built(source, wheel, sdist)
