"""What `/v1/routing/capabilities` says, and models that a profile does not fit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from edge import CAPABILITIES, HIDDEN, LAYERS, PROFILE, PROFILED, UNCHUNKED

from sluice.models.depth.registry import EXIT_METHODS, PROMPT_METHODS
from sluice.models.profile import ProfileError
from sluice.server.capabilities import Capabilities


def listed(kind: str, capabilities: Capabilities = CAPABILITIES) -> dict[str, Any]:
    found: dict[str, Any] = capabilities.to_wire()["depth"][kind]
    return found


@pytest.mark.parametrize(
    ("kind", "methods", "more"),
    [("exit", EXIT_METHODS, {"fixed"}), ("adaptive", PROMPT_METHODS, {"mod"})],
)
def test_every_method_with_its_parameters_and_source(
    kind: str, methods: dict[str, Any], more: set[str]
) -> None:
    found = listed(kind)
    assert {*found} == {*methods} | more
    for name, method in methods.items():
        entry = found[name]
        assert entry["source"] == method.source
        assert entry["parameters"] == {
            key: {"low": p.low, "high": p.high, "default": p.default}
            for key, p in method.parameters.items()
        }
        assert entry["available"] == (not method.profile_tensors)
        assert (entry["reason"] is None) == entry["available"]
    assert all(entry["source"] for entry in found.values())


def test_a_profile_makes_its_methods_available() -> None:
    without, found = listed("exit"), listed("exit", PROFILED)
    assert "--profile" in without["classifier"]["reason"]
    assert found["classifier"]["available"]
    assert not found["q_exit"]["available"]
    assert "q_exit" in found["q_exit"]["reason"]
    assert listed("adaptive", PROFILED)["first"]["available"]


def test_what_hangs_on_the_engine() -> None:
    assert not listed("adaptive", PROFILED)["first"]["masked_prefill"]
    assert listed("adaptive", UNCHUNKED)["first"]["masked_prefill"]
    assert len(listed("adaptive")["mod"]["parameters"]["retention"]["default"]) == LAYERS
    assert listed("adaptive")["lac"]["modes"] == ["readout", "replace", "predict"]
    assert listed("skip")["by"] == ["block", "attention", "mlp", "joint"]
    assert [listed("skip", each)["order"] for each in (CAPABILITIES, PROFILED)] == [
        "default",
        "profile",
    ]


def test_a_refused_engine_lists_nothing() -> None:
    wire = replace(CAPABILITIES, refusal="it is an OPT").to_wire()
    assert (wire["depth"], wire["effort"], wire["report"]) == ({}, False, False)


def vllm_config(layers: int, hidden: int) -> Any:
    """The part of vLLM's configuration that capabilities are read from."""
    model = SimpleNamespace(
        architecture="OPTForCausalLM",
        get_total_num_hidden_layers=lambda: layers,
        get_hidden_size=lambda: hidden,
        get_num_experts=lambda: 0,
    )
    scheduler = SimpleNamespace(enable_chunked_prefill=False)
    return SimpleNamespace(model_config=model, scheduler_config=scheduler)


def test_a_profile_of_another_model_stops_the_server() -> None:
    fitting = Capabilities.of(vllm_config(LAYERS, HIDDEN), ("m",), PROFILE)
    assert fitting.profile is PROFILE
    assert not fitting.chunked_prefill
    with pytest.raises(ProfileError, match=f"{LAYERS} layers of hidden size {HIDDEN}"):
        Capabilities.of(vllm_config(LAYERS, HIDDEN + 1), ("m",), PROFILE)
