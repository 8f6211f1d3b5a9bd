"""`/v1/responses` and `/v1/messages` with presets and routing, through their own clients."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import anthropic
import openai
import pytest
from support.serving import Server

QUESTION = "sort 4 1 9 3 7 2"
SKIP = {"depth": {"skip": {"blocks": [3], "attention": [5], "mlp": [6]}}}
POLICY = {"depth": {"skip": {"attention": [3, 5], "mlp": [3, 6]}, "phase": "both"}}
SETTINGS = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def claude(server: Server) -> anthropic.Anthropic:
    """Anthropic's client; vLLM wants the key as a bearer."""
    headers = {"authorization": f"Bearer {server.api_key}"}
    return anthropic.Anthropic(
        base_url=server.url, api_key="unused", default_headers=headers, max_retries=0
    )


def chat_text(client: openai.OpenAI, routing: Any) -> str:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": QUESTION}],
        extra_body={"routing": routing},
        **SETTINGS,
    )
    return str(answer.choices[0].message.content)


def respond(client: openai.OpenAI, routing: Any = None, model: str = "demo", **more: Any) -> Any:
    extra = {} if routing is None else {"routing": routing}
    return client.responses.create(
        model=model, input=QUESTION, max_output_tokens=12, temperature=0, extra_body=extra, **more
    )


def say(claude: anthropic.Anthropic, routing: Any = None, model: str = "demo", **more: Any) -> Any:
    extra = {"temperature": 0, **({} if routing is None else {"routing": routing})}
    messages = [{"role": "user", "content": QUESTION}]
    return claude.messages.create(
        model=model, messages=messages, max_tokens=12, extra_body=extra, **more
    )


def test_responses_report(client: openai.OpenAI) -> None:
    answer = respond(client, {**SKIP, "report": True})
    assert answer.routing["policy"] == POLICY
    assert answer.routing["layers"][3]["mlp"]["skipped"] > 0
    assert answer.output_text == chat_text(client, SKIP)
    assert answer.model == "demo"
    assert not hasattr(respond(client, SKIP), "routing")


def test_responses_stream(client: openai.OpenAI) -> None:
    events = [*respond(client, {"report": True}, model="demo@no-attention-3", stream=True)]
    whole = [event.response for event in events if hasattr(event, "response")]
    assert {response.model for response in whole} == {"demo@no-attention-3"}
    assert events[-1].type == "response.completed"
    assert events[-1].response.routing["policy"]["depth"]["skip"]["attention"] == [3]
    assert not any(hasattr(response, "routing") for response in whole[:-1])
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == respond(client, model="demo@no-attention-3").output_text


def test_responses_refusals(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, {"depth": {"skip": {"blocks": [99]}}})
    assert caught.value.param == "routing.depth.skip.blocks.0"
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, {"report": True}, background=True)
    assert caught.value.param == "background"
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, model="demo@fastest")
    assert caught.value.param == "model"


def test_messages_report(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    answer = say(claude, {**SKIP, "report": True})
    assert answer.routing["policy"] == POLICY
    assert answer.content[0].text == chat_text(client, SKIP)
    assert say(claude, model="demo@no-attention-3").model == "demo@no-attention-3"
    assert not hasattr(say(claude, SKIP), "routing")


def test_messages_stream(claude: anthropic.Anthropic) -> None:
    events = [*say(claude, {"report": True}, model="demo@no-attention-3", stream=True)]
    assert events[0].message.model == "demo@no-attention-3"
    closing = next(event for event in events if event.type == "message_delta")
    assert closing.routing["policy"]["depth"]["skip"]["attention"] == [3]
    assert closing.usage.output_tokens > 0
    assert events[-1].type == "message_stop"
    assert sum(hasattr(event, "routing") for event in events) == 1
    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    assert text == say(claude, model="demo@no-attention-3").content[0].text


def test_messages_refusals_have_anthropics_shape(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        say(claude, {"depth": {"skip": {"blocks": [99]}}})
    assert caught.value.body == {
        "type": "error",
        "error": {
            "type": "invalid_request_error",
            "message": "routing.depth.skip.blocks.0: layer 99 does not exist: the model has layers "
            "0 to 7",
        },
    }


def test_the_requests_are_counted(server: Server, client: openai.OpenAI) -> None:
    series = ("sluice_requests_total", frozenset({("preset", "shallow"), ("outcome", "ok")}))
    before = server.samples()[series]
    respond(client, model="demo@shallow")
    assert server.samples()[series] == before + 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_says_what_ran(server: Server, client: openai.OpenAI, stream: bool) -> None:
    """The client's name of the model in the answer and in each chunk, the policy in a header."""
    raw = client.chat.completions.with_raw_response.create(
        model="demo@shallow",
        messages=[{"role": "user", "content": '"model":"demo"'}],
        extra_headers={"x-request-id": '"model":"demo"'},
        stream=stream,
        **SETTINGS,
    )
    answers = [*raw.parse()] if stream else [raw.parse()]
    assert {answer.model for answer in answers} == {"demo@shallow"}
    digest = raw.headers["x-sluice-policy"]
    same = client.chat.completions.with_raw_response.create(
        model="demo",
        messages=[{"role": "user", "content": QUESTION}],
        extra_body={"routing": {"depth": {"skip": {"blocks": [4, 5]}, "phase": "decode"}}},
        **SETTINGS,
    )
    assert same.headers["x-sluice-policy"] == digest
    assert same.parse().model == "demo"
    stock = client.chat.completions.with_raw_response.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}], **SETTINGS
    )
    assert "x-sluice-policy" not in stock.headers


def test_openapi_describes_routing(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=60) as response:
        described = json.load(response)
    assert described["info"]["title"] == "Sluice"
    assert described["info"]["version"]
    schemas = described["components"]["schemas"]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = body["schema"]["$ref"].rpartition("/")[2]
        assert schemas[name]["properties"]["routing"]["$ref"].endswith("/RoutingFields")
    exits = schemas["DepthFields"]["properties"]["exit"]["anyOf"][0]["properties"]
    assert {"method", "layers", "threshold"} <= exits.keys()
    references = json.dumps(described).split('"$ref": "#/components/schemas/')[1:]
    assert {text.partition('"')[0] for text in references} <= schemas.keys()
