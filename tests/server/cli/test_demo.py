"""Which policies `sluice demo eval` asks for, and the arguments that it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.serving import Server

from sluice.models.offline.demo.tasks.tasks import LONGER_TASKS
from sluice.server.cli.main import main
from sluice.server.cli.policies import read_policies


def test_policies_keep_their_order_and_names(tmp_path: Path) -> None:
    file = tmp_path / "policies.json"
    file.write_text(json.dumps({"a": {"effort": 0.5}, "b": {}}))
    routing = '{"depth": {"skip": {"mlp": [1]}}}'
    assert list(read_policies(["shallow", "none", routing, f"@{file}"]).items()) == [
        ("shallow", {"preset": "shallow"}),
        ("none", {}),
        (routing, {"depth": {"skip": {"mlp": [1]}}}),
        ("a", {"effort": 0.5}),
        ("b", {}),
    ]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no policies"),
        ('{"a": []}', "a is not a routing object"),
        ('{"none": {}}', "none was given before"),
    ],
)
def test_files_that_hold_no_policies(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "policies.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=complaint):
        read_policies(["none", f"@{file}"])


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["sluice", "demo", "eval", *arguments])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


URL = ("--url", "http://127.0.0.1:9/v1")


@pytest.mark.parametrize("arguments", [(), ("--policy", "none")])
def test_no_server_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert evaluate(monkeypatch, *URL, "--items", "1", *arguments) == 2
    assert "no server answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--policy", "none"), "--policy needs --url"),
        ((*URL, "--policy", "none", "--model", "demo@x"), "not with both"),
        ((*URL, "--json", "rows.json"), "--json needs --policy"),
        ((*URL, "--policy", "{"), "not JSON"),
        ((*URL, "--policy", "@nowhere.json"), "No such file"),
        ((*URL, "--policy", "a", "--policy", "a"), "given before"),
        ((*URL, "--items", "0"), "--items"),
        ((*URL, "--longer"), "--longer needs --policy"),
    ],
)
def test_arguments_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    assert evaluate(monkeypatch, *arguments) == 2
    assert complaint in capsys.readouterr().err


def asking(server: Server, *policies: str) -> list[str]:
    arguments = ["--url", f"{server.url}/v1", "--api-key", server.api_key, "--items", "2"]
    return [*arguments, *(part for policy in policies for part in ("--policy", policy))]


def test_a_row_per_policy_of_a_server(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.json"
    exits = '{"depth": {"exit": {"method": "confidence", "threshold": 0.0, "layers": [3]}}}'
    arguments = asking(server, "none", "shallow", exits)
    assert evaluate(monkeypatch, *arguments, "--json", str(file)) == 0
    full, shallow, early = json.loads(file.read_text())
    assert [full["mean_layers"], shallow["mean_layers"], early["mean_layers"]] == [8, 6, 4]
    assert full["compute_fraction"] == full["generated_compute_fraction"] == 1
    assert shallow["generated_compute_fraction"] == pytest.approx(0.75, abs=0.01)
    assert shallow["generated_compute_fraction"] < shallow["compute_fraction"] < 1
    assert full["exact_match"] >= 0.95
    assert full["interval"][0] < full["exact_match"] <= full["interval"][1]
    assert "per token" in capsys.readouterr().out


def test_one_policy_shows_its_tasks(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(monkeypatch, *asking(server, "light")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sort" in shown
    assert "light: average exact match" in shown


def test_longer_items_are_other_items(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.json"
    arguments = asking(server, "none", "shallow")
    assert evaluate(monkeypatch, *arguments, "--longer", "--json", str(file)) == 0
    full, _ = json.loads(file.read_text())
    assert tuple(full["tasks"]) == LONGER_TASKS
    assert "shallow" in capsys.readouterr().out


def test_a_policy_that_the_server_refuses_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[Any]
) -> None:
    assert evaluate(monkeypatch, *asking(server, "none", "fastest")) == 2
    shown = capsys.readouterr()
    assert "policy fastest: routing.preset: preset 'fastest' does not exist" in shown.err
    assert "none" in shown.out, "what was measured before is shown"
