"""What leaves the HTTP edge for the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.edge import CAPABILITIES, LAYERS, PROFILED

from sluice.models.policy.extra_args import EXTRA_ARGS_KEY, RoutingExtraArgs
from sluice.models.policy.policy import Phase, SkipSet
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.presets import check_presets
from sluice.models.routing.schema import DepthFields, PresetFields, SkipFields
from sluice.server.access.capability import Caller, Capability
from sluice.server.admission import Admission

CHAT = "/v1/chat/completions"
PRESETS = {
    "half": PresetFields(depth=DepthFields(skip=SkipFields(blocks=[1, 2]))),
    "light": PresetFields(effort=0.5),
}
ADMISSION = Admission(PROFILED, PRESETS)
CALLER = Caller(None, Capability.ADMIN)
SKIP = {"depth": {"skip": {"mlp": [2]}}}


def test_a_request_without_routing_is_not_touched() -> None:
    assert ADMISSION.admit(CHAT, {"model": "m", "vllm_xargs": {"other": 1}}, CALLER) is None
    assert ADMISSION.admit(CHAT, {"model": "alias@x"}, CALLER) is None
    assert ADMISSION.admit(CHAT, {"model": "unknown@half"}, CALLER) is None


def test_the_engine_gets_extra_args_a_salt_and_the_base_model() -> None:
    body = {"model": "m@half", "routing": {"report": True}, "vllm_xargs": {"other": 1}}
    admitted = ADMISSION.admit(CHAT, body, CALLER)
    assert admitted is not None
    assert admitted.preset == "half"
    engine_body = admitted.body
    assert engine_body["model"] == "m"
    assert "routing" not in engine_body
    assert engine_body["vllm_xargs"]["other"] == 1
    extra = RoutingExtraArgs.decode(engine_body["vllm_xargs"][EXTRA_ARGS_KEY])
    assert extra.policy.skip == SkipSet.of(blocks=(1, 2))
    assert engine_body["cache_salt"].startswith("sluice-")
    assert body["vllm_xargs"] == {"other": 1}, "the client's body must not change"


def test_policies_get_salts_of_their_own() -> None:
    def salt(routing: object, client: str | None = None) -> str | None:
        body = {"model": "m", "routing": routing, **({"cache_salt": client} if client else {})}
        admitted = ADMISSION.admit(CHAT, body, CALLER)
        assert admitted is not None
        found: str | None = admitted.body.get("cache_salt")
        return found

    decode = {"depth": {**SKIP["depth"], "phase": "decode"}}
    salts = [salt(SKIP), salt({"preset": "half"}), salt(SKIP, "mine"), salt(SKIP, "yours")]
    assert len(set(salts)) == 4
    assert salt({**SKIP, "report": True}) == salts[0]
    assert salt(decode) is None
    assert salt(decode, "mine") == "mine"


def test_prompts_under_token_capacity_share_nothing() -> None:
    body = {"routing": {"depth": {"adaptive": {"method": "mod"}}}}
    first, second = (ADMISSION.admit(CHAT, body, CALLER) for _ in "ab")
    assert first is not None
    assert second is not None
    assert first.body["cache_salt"] != second.body["cache_salt"]


@pytest.mark.parametrize(
    ("routing", "effort"),
    [
        ({"report": True}, None),
        ({"effort": 0.75}, 0.75),
        ({"preset": "light"}, 0.5),
        ({"preset": "light", "effort": 1}, 1.0),
    ],
)
def test_the_effort_that_counts(routing: object, effort: float | None) -> None:
    admitted = ADMISSION.admit(CHAT, {"routing": routing}, CALLER)
    assert admitted is not None
    assert admitted.effort == effort


@pytest.mark.parametrize("routing", [[], "", 0, False])
def test_what_is_no_object_is_refused_even_if_empty(routing: object) -> None:
    with pytest.raises(RoutingError) as caught:
        ADMISSION.admit(CHAT, {"routing": routing}, CALLER)
    assert caught.value.param == "routing"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, {"include_usage": True}),
        ({"include_usage": False}, {"include_usage": True}),
        ({"continuous_usage_stats": True}, {"continuous_usage_stats": True, "include_usage": True}),
    ],
)
def test_a_streamed_report_brings_its_usage_chunk(options: object, expected: object) -> None:
    body = {"stream": True, "routing": {"report": True}, "stream_options": options}
    admitted = ADMISSION.admit(CHAT, body, CALLER)
    assert admitted is not None
    assert admitted.body["stream_options"] == expected


def test_explicit_fields_override_the_preset_one_by_one() -> None:
    routing = {"preset": "half", "depth": {"phase": "prefill"}}
    admitted = ADMISSION.admit(CHAT, {"routing": routing}, CALLER)
    assert admitted is not None
    assert admitted.extra.policy.skip == SkipSet.of(blocks=(1, 2), phase=Phase.PREFILL)
    emptied = ADMISSION.admit(CHAT, {"routing": {"preset": "half", "depth": {"skip": {}}}}, CALLER)
    assert emptied is not None
    assert emptied.extra.policy.skip.empty


def test_everything_but_one_sub_layer_may_go() -> None:
    everything = {"blocks": [*range(LAYERS)]}
    with pytest.raises(RoutingError, match="nothing to run"):
        ADMISSION.admit(CHAT, {"routing": {"depth": {"skip": everything}}}, CALLER)
    nearly = {"attention": [*range(LAYERS)], "mlp": [*range(LAYERS - 1)]}
    assert ADMISSION.admit(CHAT, {"routing": {"depth": {"skip": nearly}}}, CALLER)


def test_a_preset_the_model_cannot_run_is_found_at_start_up() -> None:
    presets = {"deep": PresetFields(depth=DepthFields(skip=SkipFields(mlp=[7])))}
    with pytest.raises(RoutingError, match="layer 7 does not exist") as caught:
        check_presets(presets, CAPABILITIES)
    assert caught.value.param == "presets.deep.depth.skip.mlp.0"


def test_an_engine_without_depth_control_says_why() -> None:
    refused = replace(CAPABILITIES, refusal="it is an OPT")
    with pytest.raises(RoutingError, match="it is an OPT") as caught:
        Admission(refused, {}).admit(CHAT, {"routing": {"report": True}}, CALLER)
    assert (caught.value.param, caught.value.reason) == ("routing", "unsupported_model")


def admitted_body(body: dict[str, object], path: str = CHAT, secret: str = "") -> dict[str, object]:
    admitted = Admission(CAPABILITIES, PRESETS, secret).admit(path, body, CALLER)
    assert admitted is not None
    return admitted.body


def test_nobody_can_name_a_salt_without_the_servers_secret() -> None:
    salts = [
        admitted_body({"routing": SKIP, "cache_salt": client}, secret=secret)["cache_salt"]
        for secret in ("one", "another")
        for client in (None, "mine")
    ]
    assert len({*salts}) == 4
    assert admitted_body({"routing": SKIP}, secret="one")["cache_salt"] == salts[0]


def test_a_salt_of_ours_is_refused_with_and_without_routing() -> None:
    salt = admitted_body({"routing": SKIP}, secret="one")["cache_salt"]
    for body in ({"cache_salt": salt}, {"cache_salt": salt, "routing": SKIP}):
        for path in (CHAT, "/inference/v1/generate", "/v1/responses", "/invocations"):
            with pytest.raises(RoutingError) as caught:
                ADMISSION.admit(path, body, CALLER)
            assert (caught.value.param, caught.value.reason) == ("cache_salt", "reserved_argument")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cache_salt", ""),
        ("cache_salt", 3),
        ("cache_salt", "a/b"),
        ("cache_salt", "x" * 129),
        ("vllm_xargs", []),
        ("vllm_xargs", ""),
        ("vllm_xargs", 0),
        ("stream_options", []),
        ("stream_options", False),
    ],
)
def test_what_vllm_refuses_is_left_for_it_to_refuse(field: str, value: object) -> None:
    body = {"routing": {**SKIP, "report": True}, "stream": True, field: value}
    assert admitted_body(body)[field] == value


@pytest.mark.parametrize(
    ("field", "value", "refused"),
    [
        ("use_beam_search", True, True),
        ("use_beam_search", "true", True),
        ("use_beam_search", 1, True),
        ("use_beam_search", "false", False),
        ("use_beam_search", 0, False),
        ("use_beam_search", None, False),
        ("use_beam_search", "perhaps", False),
        ("use_beam_search", [True], False),
        ("background", True, True),
        ("background", False, False),
        ("prompt_embeds", "AAAA", True),
        ("prompt_embeds", None, False),
    ],
)
def test_what_does_not_run_together(field: str, value: object, refused: bool) -> None:
    """A value counts as vLLM reads it."""
    body = {"routing": SKIP, field: value}
    if not refused:
        assert admitted_body(body)[field] == value
        return
    with pytest.raises(RoutingError) as caught:
        ADMISSION.admit(CHAT, body, CALLER)
    assert (caught.value.param, caught.value.reason) == (field, "unsupported_combination")


def test_extra_body_sent_as_a_field_says_what_to_do() -> None:
    for path in (CHAT, "/v1/messages", "/invocations"):
        with pytest.raises(RoutingError, match="at the top level") as caught:
            ADMISSION.admit(path, {"extra_body": {"routing": SKIP}}, CALLER)
        assert caught.value.param == "extra_body.routing"
    assert ADMISSION.admit(CHAT, {"extra_body": {"top_k": 3}}, CALLER) is None


def test_usage_is_asked_for_where_it_is_a_choice() -> None:
    body = {"stream": True, "routing": {"report": True}}
    assert "stream_options" not in admitted_body(body, "/v1/responses")
    assert "stream_options" not in admitted_body(body, "/v1/messages")
    assert "stream_options" not in admitted_body({**body, "stream": "false"})


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (
            {"preset": "light", **SKIP},
            "effort leaves the choice to the server: it does not go together with depth.skip, "
            "depth.exit or depth.adaptive (preset 'light' brings effort)",
        ),
        (
            {"preset": "half", "depth": {"adaptive": {"method": "mod"}}},
            "depth.adaptive does not go together with depth.skip (preset 'half' brings depth.skip)",
        ),
    ],
)
def test_a_clash_with_a_preset_says_what_the_preset_brings(routing: object, message: str) -> None:
    with pytest.raises(RoutingError) as caught:
        ADMISSION.admit(CHAT, {"routing": routing}, CALLER)
    assert caught.value.message == message


def test_the_answer_is_to_have_the_clients_name_of_the_model() -> None:
    def names(model: str | None, routing: object = None) -> tuple[str, str] | None:
        admitted = ADMISSION.admit(CHAT, {"model": model, "routing": routing}, CALLER)
        assert admitted is not None
        return admitted.model

    assert names("m@half") == ("m", "m@half")
    assert names("alias@x@half") == ("m", "alias@x@half")
    assert names("m", {"preset": "half"}) is None


FRACTION = {"depth": {"skip": {"fraction": 0.5, "by": "block"}}}


@pytest.mark.parametrize(
    ("routing", "param"),
    [
        ({"effort": 0.5}, "routing.effort"),
        ({"preset": "light"}, "routing.preset"),
        (FRACTION, "routing.depth.skip.fraction"),
    ],
)
def test_an_order_that_nobody_measured_is_refused(routing: dict[str, Any], param: str) -> None:
    """The layers that it would leave out may be those that the model cannot do without."""
    body = {"model": "m", "routing": routing}
    with pytest.raises(RoutingError) as caught:
        Admission(CAPABILITIES, PRESETS).admit(CHAT, body, CALLER)
    assert (caught.value.param, caught.value.reason) == (param, "needs_profile")
    assert "`sluice calibrate MODEL --quick`" in caught.value.message
    assert Admission(PROFILED, PRESETS).admit(CHAT, body, CALLER) is not None


@pytest.mark.parametrize("routing", [{"effort": 1.0}, SKIP, {"preset": "half"}])
def test_named_layers_need_no_order(routing: dict[str, Any]) -> None:
    body = {"model": "m", "routing": routing}
    assert Admission(CAPABILITIES, PRESETS).admit(CHAT, body, CALLER) is not None
