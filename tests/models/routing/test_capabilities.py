"""What an engine can do, and models that a profile does not fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.checkpoints import TENSORS, write_checkpoint
from support.edge import (
    EXPERT_PROFILE,
    HIDDEN,
    LAYERS,
    PLAIN_SHAPE,
    PROFILE,
    changed,
)

from sluice.models.profile.fingerprint import FingerprintError, fingerprint
from sluice.models.profile.profile import Profile, ProfileError
from sluice.models.routing.capabilities import Capabilities


def vllm_config(
    layers: int,
    hidden: int,
    experts: int = 0,
    blocks: int | None = 9,
    window: int | None = None,
    architecture: str = "OlmoeForCausalLM",
    folder: Path = Path("nowhere"),
    compilation: int = 0,
) -> Any:
    """The part of vLLM's configuration that capabilities are read from."""
    model = SimpleNamespace(
        model=str(folder),
        revision=None,
        architecture=architecture,
        get_total_num_hidden_layers=lambda: layers,
        get_hidden_size=lambda: hidden,
        get_num_experts=lambda: experts,
        max_model_len=64,
        hf_text_config=SimpleNamespace(sliding_window=window),
    )
    scheduler = SimpleNamespace(enable_chunked_prefill=False)
    return SimpleNamespace(
        model_config=model,
        scheduler_config=scheduler,
        cache_config=SimpleNamespace(
            num_gpu_blocks=blocks, block_size=16, kv_sharing_fast_prefill=False
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            data_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_eplb=False,
            enable_dbo=False,
            enable_batch_sharded_sampling=None,
        ),
        compilation_config=SimpleNamespace(mode=compilation, cudagraph_mode=None),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
    )


DENSE: dict[str, Any] = {"shape": None, "refusal": None}
ROUTED: dict[str, Any] = {"shape": PLAIN_SHAPE.to_dict(), "refusal": None}


def capabilities_of(
    profile: Profile | None = None, answer: dict[str, Any] = ROUTED, **config: Any
) -> Capabilities:
    return Capabilities.of(
        vllm_config(LAYERS, HIDDEN, **{"experts": 8, **config}), ("m",), profile, answer, True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "small")


def bound(profile: Profile, folder: Path, **fields: Any) -> Profile:
    """A profile of the model in a folder."""
    model = {**profile.fields.model.model_dump(), "fingerprint": fingerprint(folder)}
    return changed(profile, model=model, **fields)


def test_a_profile_of_another_model_stops_the_server(folder: Path, tmp_path: Path) -> None:
    profile = bound(PROFILE, folder)
    fitting = capabilities_of(profile, DENSE, experts=0, folder=folder)
    assert fitting.profile is profile
    assert not fitting.chunked_prefill
    wider = vllm_config(LAYERS, HIDDEN + 1, folder=folder)
    with pytest.raises(ProfileError, match=f"{LAYERS} layers of hidden size {HIDDEN}, and"):
        Capabilities.of(wider, ("m",), profile, DENSE, True)
    other = write_checkpoint(tmp_path, {**TENSORS, "a": TENSORS["a"] + 1})
    with pytest.raises(ProfileError, match=f"that of {tmp_path} is {fingerprint(other)[:12]}"):
        capabilities_of(profile, DENSE, experts=0, folder=other)
    with pytest.raises(FingerprintError, match="nobody/nothing: neither a folder nor a model"):
        capabilities_of(profile, DENSE, experts=0, folder=Path("nobody/nothing"))


def test_the_workers_answer_about_experts() -> None:
    found = capabilities_of()
    assert (found.expert_shape, found.expert_refusal) == (PLAIN_SHAPE, None)
    assert found.expert_routing
    dense = capabilities_of(answer=DENSE, experts=0)
    assert dense.expert_shape is None
    assert dense.expert_refusal == "the model has no routed experts"
    unknown = capabilities_of(answer=DENSE, architecture="OPTForCausalLM")
    assert "OPTForCausalLM" in (unknown.expert_refusal or "")
    fused = capabilities_of(answer={"shape": None, "refusal": "one kernel does it all"})
    assert fused.expert_refusal == "one kernel does it all"


def test_a_contrast_needs_room_for_two_passes() -> None:
    """Two passes over 4 blocks and the one that vLLM keeps; twice that with a sliding window."""
    assert capabilities_of(blocks=9).contrast_refusal is None
    assert capabilities_of(blocks=None).contrast_refusal is None
    refusal = capabilities_of(blocks=8).contrast_refusal
    assert refusal is not None
    assert "has 8 blocks" in refusal
    assert "need 9" in refusal
    assert capabilities_of(blocks=17, window=16).contrast_refusal is None
    assert capabilities_of(blocks=16, window=16).contrast_refusal is not None


BEHAVIOUR = {
    "experts": ((2, 1), (3, 4)),
    "scores": (0.5, 0.25),
    "measure": "weight",
    "prompts": (9, 8),
}

MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "super expert of a dense layer": ({"super_experts": ((0, 1), (1, 1))}, r"super_experts\.1"),
    "super expert of no layer": ({"super_experts": ((6, 1),)}, r"super_experts\.0"),
    "super expert that is not there": ({"super_experts": ((0, 8),)}, "expert 8 in layer 0"),
    "negative super expert": ({"super_experts": ((0, -1),)}, "expert -1 in layer 0"),
    "behaviour of a dense layer": (
        {"behaviours": {"a": {**BEHAVIOUR, "experts": ((0, 1), (1, 1))}}},
        r"behaviours\.a\.experts\.1",
    ),
    "behaviour of no expert": (
        {"behaviours": {"a": {**BEHAVIOUR, "experts": ((0, 8), (0, 1))}}},
        "expert 8 in layer 0",
    ),
    "references of a dense layer": (
        {"references": {"a": {"layers": (0, 1), "width": HIDDEN}}},
        r"references\.a: layer 1",
    ),
    "references of no layer": (
        {"references": {"a": {"layers": (), "width": HIDDEN}}},
        r"references\.a: layers",
    ),
    "references out of order": (
        {"references": {"a": {"layers": (3, 2), "width": HIDDEN}}},
        r"references\.a: layers",
    ),
    "embeddings of another width": (
        {"references": {"a": {"layers": (2,), "width": HIDDEN + 1}}},
        r"references\.a: the model's embeddings are 8 wide",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_profile_of_other_experts_stops_the_server(name: str, folder: Path) -> None:
    changes, complaint = MISFITS[name]
    with pytest.raises(ProfileError, match=complaint):
        capabilities_of(bound(PROFILE, folder, **changes), folder=folder)


def test_a_profile_with_experts_on_other_engines(folder: Path) -> None:
    profile = bound(EXPERT_PROFILE, folder)
    assert capabilities_of(profile, folder=folder).profile is profile
    with pytest.raises(ProfileError, match=r"super_experts\.0"):
        capabilities_of(profile, DENSE, experts=0, folder=folder)
    # The model has experts, and this engine cannot control them: the profile may still be right.
    fused = {"shape": None, "refusal": "one kernel does it all"}
    assert capabilities_of(profile, fused, folder=folder).profile is profile


def test_how_the_engine_runs_the_model() -> None:
    """vLLM's compilation mode 0 is none, 3 what it does by default."""
    assert [capabilities_of(compilation=mode).mode for mode in (0, 3)] == ["eager", "compiled"]
