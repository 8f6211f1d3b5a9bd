"""Bad input: 400 with the dotted field, the engine untouched, the next request served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support.serving import Server, running_server
from support.tiny import VOCABULARY

from sluice.models.offline.demo import DEMO_MODEL_DIR

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "copy abc"}], "max_tokens": 2}


def post(
    server: Server, path: str, body: Any, api_key: str | None = None
) -> tuple[int, dict[str, Any]]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer = server.post(path, raw, api_key)
    return status, json.loads(answer)


def routed(routing: Any, **changes: Any) -> dict[str, Any]:
    return {**CHAT, **changes, "routing": routing}


BAD = {
    "unknown key": (routed({"dept": {}}), "routing.dept"),
    "unknown depth key": (routed({"depth": {"exits": {}}}), "routing.depth.exits"),
    "exit without method": (routed({"depth": {"exit": {}}}), "routing.depth.exit.method"),
    "exit that is not there": (
        routed({"depth": {"exit": {"method": "lucky"}}}),
        "routing.depth.exit.method",
    ),
    "exit after layers that no threshold was calibrated for": (
        routed({"depth": {"exit": {"method": "entropy", "layers": [1, 2]}}}),
        "routing.depth.exit.threshold",
    ),
    "exit after the last layer": (
        routed({"depth": {"exit": {"method": "fixed", "layers": [7]}}}),
        "routing.depth.exit.layers.0",
    ),
    "fraction of nothing in particular": (
        routed({"depth": {"skip": {"fraction": 0.5}}}),
        "routing.depth.skip.by",
    ),
    "adaptive beside skip": (
        routed({"depth": {"adaptive": {"method": "lac"}, "skip": {"mlp": [1]}}}),
        "routing.depth.adaptive",
    ),
    "masked prefill of mod": (
        routed({"depth": {"adaptive": {"method": "mod", "masked_prefill": True}}}),
        "routing.depth.adaptive.masked_prefill",
    ),
    "effort over 1": (routed({"effort": 1.5}), "routing.effort"),
    "effort beside skip": (
        routed({"effort": 0.5, "depth": {"skip": {"mlp": [1]}}}),
        "routing.effort",
    ),
    "a preset's effort beside skip": (
        routed({"depth": {"skip": {"mlp": [1]}}}, model="demo@light"),
        "routing.effort",
    ),
    "phase for an exit that has none": (
        routed({"depth": {"exit": {"method": "entropy", "threshold": 1}, "phase": "decode"}}),
        "routing.depth.phase",
    ),
    "unknown skip key": (
        routed({"depth": {"skip": {"layers": [1]}}}),
        "routing.depth.skip.layers",
    ),
    "not an object": (routed([1]), "routing"),
    "string for a list": (
        routed({"depth": {"skip": {"blocks": "3"}}}),
        "routing.depth.skip.blocks",
    ),
    "string for a layer": (
        routed({"depth": {"skip": {"blocks": ["3"]}}}),
        "routing.depth.skip.blocks.0",
    ),
    "boolean for a layer": (
        routed({"depth": {"skip": {"mlp": [True]}}}),
        "routing.depth.skip.mlp.0",
    ),
    "float for a layer": (
        routed({"depth": {"skip": {"mlp": [1.0]}}}),
        "routing.depth.skip.mlp.0",
    ),
    "report is no boolean": (routed({"report": "yes"}), "routing.report"),
    "unknown phase": (
        routed({"depth": {"skip": {"mlp": [1]}, "phase": "always"}}),
        "routing.depth.phase",
    ),
    "phase alone": (routed({"depth": {"phase": "decode"}}), "routing.depth.phase"),
    "layer too high": (
        routed({"depth": {"skip": {"attention": [0, 8]}}}),
        "routing.depth.skip.attention.1",
    ),
    "negative layer": (
        routed({"depth": {"skip": {"blocks": [-1]}}}),
        "routing.depth.skip.blocks.0",
    ),
    "everything": (routed({"depth": {"skip": {"blocks": list(range(8))}}}), "routing.depth.skip"),
    "unknown expert key": (routed({"experts": {"expert": 1}}), "routing.experts.expert"),
    "string for a top_k": (routed({"experts": {"top_k": "2"}}), "routing.experts.top_k"),
    "string in a list of top_k": (
        routed({"experts": {"top_k": [2, "2"]}}),
        "routing.experts.top_k.1",
    ),
    "infinite bias": (
        routed({"experts": {"bias": [{"layer": 0, "expert": 0, "value": float("inf")}]}}),
        "routing.experts.bias.0.value",
    ),
    "number beyond all floats": (
        routed({"experts": {"contrast": {"weak_rank": 10**400}}}),
        "routing.experts.contrast.weak_rank",
    ),
    "top_k for some layers": (routed({"experts": {"top_k": [2]}}), "routing.experts.top_k"),
    "expert too high": (
        routed({"experts": {"deactivate": [{"layer": 0, "experts": [1, 16]}]}}),
        "routing.experts.deactivate.0.experts.1",
    ),
    "too few experts": (
        routed({"experts": {"deactivate": [{"layer": 2, "experts": list(range(13))}]}}),
        "routing.experts.deactivate.0",
    ),
    "contrast beside an effort": (
        routed({"experts": {"contrast": {"weak_rank": 1}}, "effort": 0.8}),
        "routing.experts.contrast",
    ),
    "references that are not there": (
        routed({"experts": {"remix": {"method": "mode", "references": "nowhere"}}}),
        "routing.experts.remix.references",
    ),
    "unknown preset": (routed({"preset": "fastest"}), "routing.preset"),
    "unknown preset by model": ({**CHAT, "model": "demo@fastest"}, "model"),
    "two presets": (
        routed({"preset": "shallow"}, model="demo@no-attention-3"),
        "routing.preset",
    ),
    "prompt embeddings": (routed({"report": True}, prompt_embeds="AAAA"), "prompt_embeds"),
    "beam search": (routed({"report": True}, use_beam_search=True), "use_beam_search"),
    "smuggled": ({**CHAT, "vllm_xargs": {"sluice": "{}"}}, "vllm_xargs.sluice"),
    "smuggled beside routing": (
        routed({"report": True}, vllm_xargs={"sluice": "{}"}),
        "vllm_xargs.sluice",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_with_the_field(server: Server, name: str) -> None:
    body, param = BAD[name]
    status, answer = post(server, "/v1/chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["code"] == 400
    assert answer["error"]["type"] == "BadRequestError"
    assert answer["error"]["message"]


def test_the_client_raises_bad_request_and_the_next_request_is_served(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            **CHAT, extra_body={"routing": {"depth": {"skip": {"blocks": [99]}}}}
        )
    assert caught.value.param == "routing.depth.skip.blocks.0"
    assert client.chat.completions.create(**CHAT).choices[0].message.content


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"vllm_xargs": {"sluice": "{}"}}, "vllm_xargs.sluice"),
        ("/tokenize", {"vllm_xargs": {"sluice": "{}"}}, "vllm_xargs.sluice"),
        ("/v1/responses", {"vllm_xargs": {"sluice": "{}"}}, "vllm_xargs.sluice"),
        ("/v1/chat/completions/batch", {"vllm_xargs": {"sluice": 1}}, "vllm_xargs.sluice"),
        ("/invocations", {"vllm_xargs": {"sluice": "{}"}}, "vllm_xargs.sluice"),
        (
            "/inference/v1/generate",
            {"token_ids": [1], "sampling_params": {"extra_args": {"sluice": "{}"}}},
            "sampling_params.extra_args.sluice",
        ),
        ("/v1/chat/completions/batch", {"routing": {"report": True}}, "routing"),
        ("/v1/chat/completions/render", {"routing": {"report": True}}, "routing"),
        ("/inference/v1/generate", {"routing": {"report": True}}, "routing"),
        ("/invocations", {"routing": {"report": True}}, "routing"),
        ("/invocations", {"model": "demo@shallow"}, "model"),
        ("/inference/v1/generate", {"cache_salt": "sluice-x"}, "cache_salt"),
        ("/v1/responses", {"cache_salt": "sluice-x"}, "cache_salt"),
    ],
)
def test_other_endpoints_neither_smuggle_nor_ignore(
    server: Server, path: str, body: dict[str, Any], param: str
) -> None:
    status, answer = post(server, path, {"model": "demo", "input": "a", "prompt": "a", **body})
    assert (status, answer["error"]["param"]) == (400, param)


def test_a_deeply_nested_body_does_not_hide_anything(server: Server) -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    status, answer = post(
        server, "/v1/chat/completions", {"junk": deep, **CHAT, "vllm_xargs": {"sluice": "{}"}}
    )
    assert (status, answer["error"]["param"]) == (400, "vllm_xargs.sluice")
    nested = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
    status, answer = post(server, "/v1/chat/completions", nested)
    assert status == 400


def test_what_is_no_json_is_answered_by_vllm(server: Server) -> None:
    status, answer = post(server, "/v1/chat/completions", b"{not json")
    assert status == 400
    assert answer["error"]["message"]


def test_without_the_key_nothing_is_told_about_routing(server: Server) -> None:
    status, answer = post(server, "/v1/chat/completions", routed([1]), api_key="another")
    assert status == 401
    assert "routing" not in json.dumps(answer)


def test_null_routing_is_no_routing(server: Server) -> None:
    status, answer = post(server, "/v1/chat/completions", routed(None))
    assert status == 200
    assert "routing" not in answer


@pytest.fixture(scope="module")
def unsupported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A stock architecture that the layer loop does not know, with the demo's tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("unsupported")
    model = folder / "model"
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    transformers.AutoTokenizer.from_pretrained(DEMO_MODEL_DIR).save_pretrained(model)
    arguments = [str(model), "--served-model-name", "neox", "--enforce-eager"]
    with running_server(folder / "log", *arguments, "--kv-cache-memory-bytes", "64M") as running:
        yield running


def test_unsupported_family_serves_stock_and_refuses_routing(unsupported: Server) -> None:
    client = unsupported.client()
    capabilities = client.get("/routing/capabilities", cast_to=dict[str, Any])
    assert not capabilities["supported"]
    assert "GPTNeoXForCausalLM" in capabilities["reason"]
    request = {**CHAT, "model": "neox"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            **request, extra_body={"routing": {"depth": {"skip": {"blocks": [0]}}}}
        )
    assert caught.value.param == "routing"
    assert client.chat.completions.create(**request).usage.completion_tokens > 0


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("presets: {Fast: {}}", "not a preset name"),
        ("presets: {none: {}}", "not a preset name"),
        ("presets: {fast: {depth: {skip: {layers: [1]}}}}", "presets.fast.depth.skip.layers"),
        ("presets: {fast: {effort: 2}}", "presets.fast.effort"),
        ("presets: {fast: {depth: {exit: {layers: [1]}}}}", "presets.fast.depth.exit.method"),
        ("presets: {fast: {experts: {top_k: [1, x]}}}", "presets.fast.experts.top_k.1"),
        ("presets: {fast: {experts: {budget: {k0: 1}}}}", "presets.fast.experts.budget.method"),
        ("presets: [", "presets file"),
        ("[]", "presets file"),
    ],
)
def test_bad_presets_files_stop_the_server_before_the_engine(
    tmp_path: Path, content: str, complaint: str
) -> None:
    from sluice.models.routing.presets import PresetsFileError, load_presets

    path = tmp_path / "presets.yaml"
    path.write_text(content)
    with pytest.raises(PresetsFileError, match=complaint):
        load_presets(path)
