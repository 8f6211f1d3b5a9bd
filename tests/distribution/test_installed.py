"""The wheel, installed where nothing else of this repository is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable
from importlib.metadata import distribution, requires
from pathlib import Path
from sysconfig import get_path

import pytest
from packaging.requirements import Requirement

SITE = Path(get_path("purelib"))
OURS = re.compile(r"(__editable__.*sluice|sluice-|vllm_sluice-)")
START_LIMIT_SECONDS = 300


def environment_with(folder: Path, wheel: Path, entries: Iterable[str]) -> Path:
    """A fresh environment with the wheel and some packages of this one: its `bin`.

    The packages are linked, not copied: vLLM and torch have gigabytes.

    Args:
        folder: to make it in.
        wheel: to install.
        entries: of this environment's `site-packages`.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    for entry in entries:
        (site / entry).symlink_to(SITE / entry)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", wheel], check=True)
    return python.parent


def base_entries() -> set[str]:
    """What the plain package needs, and what that needs."""
    entries: set[str] = set()
    names, seen = ["vllm-sluice"], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        needed = map(Requirement, requires(name) or ())
        names += [
            each.name for each in needed if not each.marker or each.marker.evaluate({"extra": ""})
        ]
        if name != "vllm-sluice":
            entries |= {file.parts[0] for file in distribution(name).files if file.parts[0] != ".."}
    return {entry for entry in entries if (SITE / entry).exists()}


def sluice(bin_folder: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [bin_folder / "sluice", *arguments],
        input=text,
        capture_output=True,
        text=True,
        cwd=bin_folder,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With everything that this environment has."""
    entries = [
        each.name for each in SITE.iterdir() if each.suffix != ".pth" and not OURS.match(each.name)
    ]
    return environment_with(tmp_path_factory.mktemp("whole"), built.wheel, entries)


@pytest.fixture(scope="module")
def bare(built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without extras and without vLLM."""
    return environment_with(tmp_path_factory.mktemp("bare"), built.wheel, base_entries())


def test_the_command_runs(installed: Path) -> None:
    version = sluice(installed, "--version")
    assert (version.returncode, version.stderr) == (0, "")
    assert re.fullmatch(r"sluice \d\S*, vLLM \d\S*\n", version.stdout)
    assert sluice(installed, "serve", "--help").returncode == 0
    assert sluice(installed, "loadtest", "--help").returncode == 0
    hashed = sluice(installed, "keys", "hash", text="a-key\n")
    assert re.fullmatch(r"sha256: [0-9a-f]{64}\n", hashed.stdout)


def test_the_demo_model_is_served(installed: Path, tmp_path: Path) -> None:
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_USE_V2_MODEL_RUNNER")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    log = tmp_path / "log"
    arguments = ["serve", "--enforce-eager", "--port", "0", "--console"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [installed / "sluice", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env=environment,
        )
        try:
            deadline = time.monotonic() + START_LIMIT_SECONDS
            ready = None
            while ready is None and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
                ready = re.search(r"^Sluice .* console (\S+) - \d+ presets$", log.read_text(), re.M)
            assert ready is not None, log.read_text()[-4000:]
            with urllib.request.urlopen(f"{ready[1]}/", timeout=30) as page:
                assert b"<title>" in page.read()
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["serve"],
            'vLLM not installed: on a GPU pip install "vllm-sluice[cuda]", on a CPU see '
            "docs/installation.md",
        ),
        (
            ["calibrate", "MODEL"],
            'jinja2 and matplotlib and optuna not installed: pip install "vllm-sluice[calibrate]"',
        ),
        (
            ["eval", "--tasks", "x", "--url", "http://127.0.0.1:1/v1"],
            'openai not installed: pip install "vllm-sluice[eval]"',
        ),
        (
            ["demo", "eval", "--url", "http://127.0.0.1:1/v1"],
            'openai not installed: pip install "vllm-sluice[eval]"',
        ),
        (
            ["report", "profile"],
            'jinja2 and matplotlib not installed: pip install "vllm-sluice[report]"',
        ),
        (
            ["loadtest", "steady", "--serve", "--out", "x"],
            "guidellm and httpx and jinja2 and matplotlib and psutil not installed: "
            'pip install "vllm-sluice[loadtest]"',
        ),
    ],
)
def test_what_is_missing_is_named(bare: Path, arguments: list[str], message: str) -> None:
    ended = sluice(bare, *arguments)
    command = " ".join(arguments[:2] if arguments[0] == "demo" else arguments[:1])
    assert ended.stderr == f"sluice {command}: error: {message}\n"
    assert (ended.returncode, ended.stdout) == (2, "")


def test_what_needs_no_extra_runs_without(bare: Path) -> None:
    assert sluice(bare, "--version").stdout.endswith(", vLLM not installed\n")
    for command in ("serve", "eval", "report", "keys"):
        assert sluice(bare, command, "--help").returncode == 0
