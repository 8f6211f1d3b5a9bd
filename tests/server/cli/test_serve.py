"""How `sluice serve` sets vLLM up."""

from __future__ import annotations

import argparse
import hashlib
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import write_checkpoint
from support.full_profile import frontier, point
from support.serving import running_server

from sluice.models.offline.demo import DEMO_MODEL_DIR
from sluice.models.profile.fingerprint import fingerprint
from sluice.models.profile.profile import PROFILE_ENV, Profile
from sluice.models.profile.writer import write_profile
from sluice.server.cli import serve, serve_checks


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
        serve_checks.refuse_unsupported(argparse.ArgumentParser(), argparse.Namespace(grpc=grpc))
    assert "not supported" in capsys.readouterr().err


def profile_folder(folder: Path, made_for: str = "0" * 64, **fields: Any) -> Path:
    model = {"layers": 3, "hidden": 4, "fingerprint": made_for}
    write_profile(folder, {"model": model, **fields}, {}, {})
    return folder


def chosen(profile: Path | None) -> str | None:
    serve_checks.choose_profile(argparse.ArgumentParser(), argparse.Namespace(profile=profile))
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


def test_the_profile_of_another_model_stops_the_server(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parser = argparse.ArgumentParser()
    served = write_checkpoint(tmp_path / "served")
    fitting = Profile.load(profile_folder(tmp_path / "fitting", fingerprint(served)))
    other = Profile.load(profile_folder(tmp_path / "other"))
    serve_checks.check_profile(parser, fitting, str(served))
    serve_checks.check_profile(parser, None, str(served))
    serve_checks.check_profile(
        parser, other, "someone/on-the-hub"
    )  # The engine's part, once it is here.
    with pytest.raises(SystemExit):
        serve_checks.check_profile(parser, other, str(served))
    complaint = capsys.readouterr().err
    for name in (other.folder, "0" * 12, served, fingerprint(served)[:12]):
        assert str(name) in complaint
    (served / "model-0.safetensors").unlink()
    with pytest.raises(SystemExit):
        serve_checks.check_profile(parser, fitting, str(served))
    assert f"{served}: no safetensors weights" in capsys.readouterr().err


def test_presets_are_checked_before_the_engine_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parser = argparse.ArgumentParser()
    measured = frontier([point("full")], {"fast": "full"})
    profile = Profile.load(profile_folder(tmp_path / "profile", frontier=measured))
    presets = tmp_path / "presets.yaml"
    presets.write_text("presets: {mine: {effort: 0.5}}")
    serve_checks.check_presets(parser, presets, profile)
    serve_checks.check_presets(parser, None, None)
    presets.write_text("presets: {fast: {effort: 0.5}}")
    serve_checks.check_presets(parser, presets, None)
    with pytest.raises(SystemExit):
        serve_checks.check_presets(parser, presets, profile)
    complaint = capsys.readouterr().err
    assert all(str(name) in complaint for name in ("'fast'", presets, profile.folder))
    presets.write_text("presets: {fast: {effort: 2}}")
    with pytest.raises(SystemExit):
        serve_checks.check_presets(parser, presets, None)
    assert "presets.fast.effort" in capsys.readouterr().err
    odd = frontier([point("full", depth={"deep": 1})], {"fast": "full"})
    profile = Profile.load(profile_folder(tmp_path / "odd", frontier=odd))
    with pytest.raises(SystemExit):
        serve_checks.check_presets(parser, None, profile)
    assert "frontier.presets.fast.routing.depth.deep" in capsys.readouterr().err


def demo_arguments(profile: Path | None) -> argparse.Namespace:
    args = argparse.Namespace(
        served_model_name=None, kv_cache_memory_bytes=None, presets=None, profile=profile
    )
    serve.apply_demo_defaults(args)
    return args


def test_the_demo_model_brings_its_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(PROFILE_ENV, raising=False)
    monkeypatch.setattr(serve, "DEMO_PROFILE_DIR", tmp_path)
    assert demo_arguments(None).profile == tmp_path
    assert demo_arguments(Path("mine")).profile == Path("mine")
    monkeypatch.setattr(serve, "DEMO_PROFILE_DIR", tmp_path / "none")
    assert demo_arguments(None).profile is None
    monkeypatch.setattr(serve, "DEMO_PROFILE_DIR", tmp_path)
    monkeypatch.setenv(PROFILE_ENV, "theirs")
    assert demo_arguments(None).profile is None


LOOPBACK = ["127.0.0.1", "127.8.0.1", "::1", "localhost", "LocalHost"]
OPEN = ["", None, "0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "127.1"]


def expert_routing(*arguments: str, host: str | None = "127.0.0.1", **fields: object) -> object:
    """What `--expert-routing` comes to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--expert-routing", action=argparse.BooleanOptionalAction, default=None)
    defaults = {"host": host, "uds": None, "keys": None, **fields}
    args = parser.parse_args([*arguments], argparse.Namespace(**defaults))
    serve.choose_expert_routing(parser, args)
    return args.expert_routing


@pytest.mark.parametrize("host", LOOPBACK)
def test_expert_routing_is_on_where_only_this_machine_can_ask(host: str) -> None:
    assert expert_routing(host=host) is True
    assert expert_routing("--no-expert-routing", host=host) is False


@pytest.mark.parametrize("host", OPEN)
def test_expert_routing_is_off_elsewhere(host: str | None) -> None:
    keys = Path("keys.yaml")
    assert expert_routing(host=host) is False
    assert expert_routing(host=host, keys=keys) is False
    assert expert_routing("--expert-routing", host=host, keys=keys) is True
    assert expert_routing(host=host, uds="/run/a.sock") is True


@pytest.mark.parametrize("host", OPEN)
def test_nobody_opens_expert_routing_to_everybody(
    capsys: pytest.CaptureFixture[str], host: str | None
) -> None:
    with pytest.raises(SystemExit):
        expert_routing("--expert-routing", host=host)
    assert "needs --keys" in capsys.readouterr().err


def test_our_flags_are_part_of_vllms_parser() -> None:
    parse = serve.build_parser().parse_args
    args = parse(["--keys", "a.yaml", "--no-expert-routing", "--expert-metrics"])
    assert (args.keys, args.expert_routing, args.expert_metrics) == (Path("a.yaml"), False, True)
    args = parse([])
    assert (args.keys, args.expert_routing, args.expert_metrics) == (None, None, False)
    assert serve.is_loopback(args.host)


GIB = 1024**3


def cpu_cache(*arguments: str) -> tuple[int | None, int | None]:
    """K/V bytes and the longest context that arguments come to."""
    parser = serve.build_parser()
    args = parser.parse_args([*arguments])
    serve.limit_cpu_cache(parser, args)
    return args.kv_cache_memory_bytes, args.max_model_len


def test_a_cpu_gives_a_model_1_gib_of_cache_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert cpu_cache("model") == (GIB, -1)
    assert cpu_cache("model", "--max-model-len", "2048") == (GIB, 2048)
    assert cpu_cache("model", "--kv-cache-memory-bytes", "2G") == (2 * GIB, None)
    assert cpu_cache("model", "--gpu-memory-utilization", "0.4") == (None, None)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert cpu_cache("model") == (None, None)


def test_other_platforms_keep_vllms_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: False)
    assert cpu_cache("model") == (None, None)


def test_a_model_is_served_without_a_flag_about_memory(tmp_path: Path) -> None:
    with running_server(tmp_path / "log", str(DEMO_MODEL_DIR), "--enforce-eager") as server:
        (info,) = [labels for name, labels in server.samples() if name == "vllm:cache_config_info"]
    assert dict(info)["kv_cache_memory_bytes"] == str(GIB)


def check_keys(keys: Path | None, api_key: list[str] | None = None) -> None:
    args = argparse.Namespace(keys=keys, api_key=api_key)
    serve_checks.check_keys(argparse.ArgumentParser(), args)


@pytest.fixture
def keys_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    file = tmp_path / "keys.yaml"
    digest = hashlib.sha256(b"k").hexdigest()
    file.write_text(f"keys: [{{id: a, sha256: {digest}, capability: basic}}]")
    return file


def test_keys_are_checked_before_the_engine_starts(
    keys_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_keys(None, ["k"])
    check_keys(keys_file)
    keys_file.write_text("keys: []")
    with pytest.raises(SystemExit):
        check_keys(keys_file)
    assert f"{keys_file}.keys" in capsys.readouterr().err


@pytest.mark.parametrize("through", ["flag", "environment"])
def test_one_door_has_one_gate(
    keys_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    through: str,
) -> None:
    if through == "environment":
        monkeypatch.setenv("VLLM_API_KEY", "k")
    with pytest.raises(SystemExit):
        check_keys(keys_file, ["k"] if through == "flag" else None)
    assert "--api-key" in capsys.readouterr().err


def test_a_profile_of_another_model_is_named_at_start_up(tmp_path: Path) -> None:
    profile = profile_folder(tmp_path / "profile")
    arguments = ["--enforce-eager", "--profile", str(profile)]
    complaint = f"serve: error: profile {profile} was made for a model of 3 layers of hidden size 4"
    with (
        pytest.raises(pytest.fail.Exception, match=complaint),
        running_server(tmp_path / "log", *arguments),
    ):
        pass
