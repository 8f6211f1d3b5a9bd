"""How `sluice serve` sets vLLM up."""

from __future__ import annotations

import argparse
import os
from importlib.metadata import entry_points

import pytest

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
