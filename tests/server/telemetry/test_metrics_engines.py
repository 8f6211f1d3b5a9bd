"""Two data-parallel engines, and by vLLM's default as many API processes.

Of a dense model: vLLM 0.32.0's CPU build has no data-parallel mixture of experts (it starts, and
the first request ends in a NotImplementedError of the experts' forward pass).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.gains import Gains, settled
from support.mixed_load import asks, send
from support.processes import Processes
from support.serving import running_server
from support.tiny import LAYERS, make_model

from sluice.models.offline.demo import DEMO_MODEL_DIR

SCRAPES = 16


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    folder = tmp_path_factory.mktemp("engines")
    model = make_model("llama", folder / "model")
    settings = ["--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20)]
    names = ["--tokenizer", str(DEMO_MODEL_DIR), "--served-model-name", "demo"]
    arguments = [str(model), *settings, *names, "--data-parallel-size", "2"]
    with running_server(folder / "log", *arguments) as running:
        yield Processes(running.url, running.log)


def test_engines_are_summed(engines: Processes) -> None:
    gains = Gains(engines)
    told = send(engines, [ask for ask in asks(rounds=6) if ask.routing is None])
    settled(gains, told)
    last = str(LAYERS - 1)
    engines.answered.clear()
    for _ in range(SCRAPES):
        gains.refresh()
        for outcome, rows in (("executed", told.plain_rows), ("skipped", 0), ("filled", 0)):
            found = gains.by("sluice_layer_tokens_total", "layer", "module", "outcome")
            for layer in map(str, range(LAYERS)):
                for module in ("attention", "mlp"):
                    assert found[layer, module, outcome] == rows
        assert gains.by("sluice_exit_tokens_total", "layer") == {(last,): told.plain_generated}
        assert gains.by("sluice_requests_total", "preset", "outcome") == told.outcomes
        by_engine = gains.by("vllm:generation_tokens_total", "engine")
        assert by_engine.keys() == {("0",), ("1",)}
        assert by_engine.total() == told.completion_tokens
        ratios = {value for (name, _), value in engines.gauges().items() if "utilization" in name}
        assert ratios == {1.0}
    assert len(engines.answered) == 2
