"""One server for all tests of the HTTP edge."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from support.serving import Server, running_server

PRESETS = """
presets:
  shallow:
    description: two blocks less while decoding
    depth: {skip: {blocks: [4, 5]}, phase: decode}
  no-attention-3:
    depth: {skip: {attention: [3]}}
  light:
    description: leaves the choice of two blocks to the server
    effort: 0.75
  leave-early:
    depth: {exit: {method: confidence, threshold: 0.9, layers: [3, 5]}}
"""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model with four presets and small blocks, so that prompts fill some."""
    folder = tmp_path_factory.mktemp("server")
    presets = folder / "presets.yaml"
    presets.write_text(PRESETS)
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    settings = ["--enforce-eager", "--dtype", "float32", "--block-size", "32"]
    arguments = [*settings, "--presets", str(presets), *tools]
    with running_server(folder / "log", *arguments, api_key="a-key") as running:
        yield running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()
