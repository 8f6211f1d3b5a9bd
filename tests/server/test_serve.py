"""How `sluice serve` sets vLLM up."""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from serving import running_server

from sluice.models.profile import PROFILE_ENV
from sluice.server import serve


def test_naming_our_plugin_keeps_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    serve.allow_plugin()
    named = set(os.environ["VLLM_PLUGINS"].split(","))
    assert named >= {plugin.name for plugin in entry_points(group="vllm.general_plugins")}
    assert serve.PLUGIN in named


def test_a_chosen_list_of_plugins_only_grows_by_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    serve.allow_plugin()
    assert os.environ["VLLM_PLUGINS"] == "mine,sluice"


@pytest.mark.parametrize(("grpc", "rust"), [(True, "0"), (False, "1")])
def test_front_ends_without_our_plugin_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], grpc: bool, rust: str
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", rust)
    with pytest.raises(SystemExit):
        serve.refuse_unsupported(argparse.ArgumentParser(), argparse.Namespace(grpc=grpc))
    assert "not supported" in capsys.readouterr().err


def profile_folder(folder: Path, layers: int = 3, hidden: int = 4) -> Path:
    folder.mkdir()
    fields = {"schema_version": 1, "model": {"layers": layers, "hidden": hidden}}
    (folder / "profile.json").write_text(json.dumps(fields))
    return folder


def chosen(profile: Path | None) -> str | None:
    serve.choose_profile(argparse.ArgumentParser(), argparse.Namespace(profile=profile))
    return os.environ.get(PROFILE_ENV)


def test_the_profile_reaches_the_workers_through_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, two = profile_folder(tmp_path / "one"), profile_folder(tmp_path / "two")
    monkeypatch.setenv(PROFILE_ENV, "")
    assert chosen(None) == ""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(PROFILE_ENV, "one")
    assert chosen(None) == str(one)
    assert chosen(Path("two")) == str(two)


@pytest.mark.parametrize("through", ["flag", "environment"])
def test_a_profile_that_is_none_stops_the_server(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    through: str,
) -> None:
    monkeypatch.setenv(PROFILE_ENV, "" if through == "flag" else str(tmp_path))
    with pytest.raises(SystemExit):
        chosen(tmp_path if through == "flag" else None)
    assert f"profile {tmp_path}" in capsys.readouterr().err


def demo_arguments(profile: Path | None) -> argparse.Namespace:
    args = argparse.Namespace(
        served_model_name=None, kv_cache_memory_bytes=None, presets=None, profile=profile
    )
    serve.apply_demo_defaults(args)
    return args


def test_the_demo_model_brings_its_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(PROFILE_ENV, raising=False)
    monkeypatch.setattr(serve, "DEMO_PROFILE", tmp_path)
    assert demo_arguments(None).profile == tmp_path
    assert demo_arguments(Path("mine")).profile == Path("mine")
    monkeypatch.setattr(serve, "DEMO_PROFILE", tmp_path / "none")
    assert demo_arguments(None).profile is None
    monkeypatch.setattr(serve, "DEMO_PROFILE", tmp_path)
    monkeypatch.setenv(PROFILE_ENV, "theirs")
    assert demo_arguments(None).profile is None


def test_a_profile_of_another_model_is_named_at_start_up(tmp_path: Path) -> None:
    profile = profile_folder(tmp_path / "profile")
    arguments = ["--enforce-eager", "--profile", str(profile)]
    with (
        pytest.raises(pytest.fail.Exception, match="was made for 3 layers of hidden size 4"),
        running_server(tmp_path / "log", *arguments),
    ):
        pass
