"""`sluice report`: where the page goes, and profiles that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import run_command

from sluice.models.offline.report.page import report_page
from sluice.models.profile.profile import Profile
from sluice.models.profile.writer import write_profile
from sluice.server.cli.report import add_parser


def report(*arguments: str | Path) -> int | str | None:
    return run_command(add_parser, "report", *arguments)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    shape = {"layers": 3, "hidden": 8, "fingerprint": "ab" * 32}
    write_profile(tmp_path / "profile", {"model": shape, "skip_ratios": [0.5, 0.25, 0.125]}, {}, {})
    return tmp_path / "profile"


def test_the_page_is_written_where_it_shall_be(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    out.write_text("an older one")
    assert report(profile, "--out", out) == 0
    assert out.read_text(encoding="utf-8") == report_page(Profile.load(profile))
    assert "0.125" in out.read_text()
    assert capsys.readouterr().out == f"{out}\n"


def test_without_a_name_it_goes_here(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report("profile") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"profile", "report.html"}
    assert Profile.load(profile), "the profile is as it was"


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        ({}, "profile.json: No such file"),
        ({"profile.json": "{"}, "profile.json: not JSON"),
        ({"profile.json": '{"schema_version": 1}'}, "schema 1 is not"),
    ],
)
def test_a_profile_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: dict[str, str], complaint: str
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for name, content in broken.items():
        (folder / name).write_text(content)
    out = tmp_path / "page.html"
    assert report(folder, "--out", out) == 2
    assert complaint in capsys.readouterr().err
    assert not out.exists()


def test_a_place_that_cannot_be_written(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "nowhere" / "page.html"
    assert report(profile, "--out", out) == 2
    assert f"{out}: No such file or directory" in capsys.readouterr().err
