"""The official client against a real server: answers, streams, reports, and vLLM's own features."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from support.serving import Server

from sluice.models.offline.demo import DEMO_MODEL_DIR

LAYERS = 8
QUESTION = [{"role": "user", "content": "sort 4 1 9 3 7 2"}]
SKIP = {"depth": {"skip": {"blocks": [3], "attention": [5], "mlp": [6]}}}


def ask(client: openai.OpenAI, routing: Any = None, model: str = "demo", **options: Any) -> Any:
    settings = {"messages": QUESTION, "temperature": 0, "max_tokens": 12}
    extra = {} if routing is None else {"routing": routing}
    return client.chat.completions.create(model=model, extra_body=extra, **{**settings, **options})


def white_space_tokens() -> list[str]:
    vocabulary = json.loads((DEMO_MODEL_DIR / "tokenizer.json").read_text())["model"]["vocab"]
    return [str(token_id) for token, token_id in vocabulary.items() if token.isspace()]


def skipped(report: dict[str, Any], module: str) -> dict[int, int]:
    return {
        layer["layer"]: layer[module]["skipped"]
        for layer in report["layers"]
        if layer[module]["skipped"]
    }


def test_stock_answer_carries_no_report(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content
    assert not hasattr(answer, "routing")


def test_report_tells_what_ran(client: openai.OpenAI) -> None:
    answer = ask(client, {**SKIP, "report": True})
    report = answer.routing
    ran = answer.usage.prompt_tokens + answer.usage.completion_tokens - 1
    assert report["policy"] == {
        "depth": {"skip": {"attention": [3, 5], "mlp": [3, 6]}, "phase": "both"}
    }
    assert skipped(report, "attention") == {3: ran, 5: ran}
    assert skipped(report, "mlp") == {3: ran, 6: ran}
    for layer in report["layers"]:
        for module in ("attention", "mlp"):
            assert sum(layer[module].values()) == ran
    assert len(report["layers"]) == LAYERS
    assert 0.6 < report["compute_fraction"] < 0.8
    assert report["warnings"] == []


@pytest.mark.parametrize(("phase", "outcome"), [("decode", "skipped"), ("prefill", "filled")])
def test_phase_is_counted_by_token(client: openai.OpenAI, phase: str, outcome: str) -> None:
    routing = {"depth": {"skip": {"attention": [3]}, "phase": phase}, "report": True}
    answer = ask(client, routing, max_tokens=6)
    tokens = {"decode": answer.usage.completion_tokens - 1, "prefill": answer.usage.prompt_tokens}
    assert answer.routing["layers"][3]["attention"][outcome] == tokens[phase]


def test_stream_carries_the_report_on_the_usage_chunk(client: openai.OpenAI) -> None:
    whole = ask(client, {**SKIP, "report": True})
    chunks = list(ask(client, {**SKIP, "report": True}, stream=True))
    *parts, last = chunks
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.routing["policy"] == whole.routing["policy"]
    assert not any(hasattr(part, "routing") for part in parts)


def test_stream_without_report_is_left_alone(client: openai.OpenAI) -> None:
    chunks = list(ask(client, SKIP, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert not any(hasattr(chunk, "routing") for chunk in chunks)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo",
        prompt=["abc", "def"],
        max_tokens=4,
        temperature=1.0,
        seed=3,
        n=2,
        logprobs=2,
        extra_body={"routing": {**SKIP, "report": True}, "ignore_eos": True},
    )
    assert len(answer.choices) == 4
    ran = sum(answer.routing["layers"][0]["mlp"].values())
    assert ran > 0
    assert skipped(answer.routing, "mlp") == {3: ran, 6: ran}


def test_presets_by_name_and_by_model_id(client: openai.OpenAI) -> None:
    by_name = ask(client, {"preset": "shallow", "report": True})
    by_model = ask(client, {"report": True}, model="demo@shallow")
    assert by_name.routing["policy"] == by_model.routing["policy"]
    assert by_name.choices[0].message.content == by_model.choices[0].message.content
    overridden = ask(client, {"preset": "shallow", "depth": {"skip": {"mlp": [2]}}, "report": True})
    assert overridden.routing["policy"] == {
        "depth": {"skip": {"attention": [], "mlp": [2]}, "phase": "decode"}
    }


PRESETS = ("shallow", "no-attention-3", "light", "leave-early", "quality", "balanced", "fast")
"""Of the file, and of the demo model's profile."""


def test_models_lists_presets_with_their_parent(client: openai.OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) == {"demo", *(f"demo@{name}" for name in PRESETS)}
    assert cards["demo"].parent is None
    assert cards["demo@shallow"].parent == "demo"


def test_capabilities_and_presets(client: openai.OpenAI) -> None:
    capabilities = client.get("/routing/capabilities", cast_to=dict[str, Any])
    assert capabilities["supported"]
    assert (capabilities["layers"], capabilities["experts"]) == (LAYERS, 16)
    assert capabilities["depth"]["phase"] == ["prefill", "decode", "both"]
    assert capabilities["effort"]
    assert capabilities["depth"]["exit"]["confidence"]["available"]
    assert capabilities["depth"]["adaptive"]["lac"]["available"]
    presets = client.get("/routing/presets", cast_to=dict[str, Any])["data"]
    assert [(preset["id"], preset["model"]) for preset in presets] == [
        (name, f"demo@{name}") for name in PRESETS
    ]
    for preset in presets:
        answer = ask(client, {"report": True}, model=preset["model"])
        assert answer.routing["policy"] == preset["policy"]


def test_neighbours_do_not_matter(client: openai.OpenAI) -> None:
    """Each policy's answer, alone and in one batch with all the others, several times over."""
    routings: list[Any] = [
        None,
        SKIP,
        {"depth": {"skip": {"blocks": [2]}, "phase": "decode"}},
        {"depth": {"skip": {"attention": [1, 2]}, "phase": "prefill"}},
        {"preset": "no-attention-3"},
    ]

    def answer(routing: Any) -> str:
        body = {"ignore_eos": True, **({} if routing is None else {"routing": routing})}
        got = client.chat.completions.create(
            model="demo", messages=QUESTION, temperature=0, max_tokens=24, extra_body=body
        )
        return str(got.choices[0].message.content)

    alone = [answer(routing) for routing in routings]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(answer, routings * 4))
    assert together == alone * 4


LEAVING = {"method": "confidence", "threshold": 0.9, "layers": [1, 2, 3]}


@pytest.mark.parametrize(
    "routing",
    [
        SKIP,
        {"depth": {"exit": LEAVING}},
        {"depth": {"exit": {**LEAVING, "kv": "recompute"}}},
        {"depth": {"adaptive": {"method": "similarity", "budget": 0.6}}},
        {"effort": 0.6},
    ],
    ids=["skip", "exit", "recompute", "similarity", "effort"],
)
class TestVllmFeaturesKeepWorking:
    """Each with routing in the same request."""

    def test_stop_strings(self, client: openai.OpenAI, routing: dict[str, Any]) -> None:
        free = ask(client, routing).choices[0].message.content
        stop = free[2]
        stopped = ask(client, routing, stop=[stop]).choices[0]
        assert stopped.message.content == free[: free.index(stop)]
        assert stopped.finish_reason == "stop"

    def test_logprobs(self, client: openai.OpenAI, routing: dict[str, Any]) -> None:
        answer = ask(client, routing, logprobs=True, top_logprobs=3).choices[0]
        assert len(answer.logprobs.content[0].top_logprobs) == 3

    def test_seeded_sampling(self, client: openai.OpenAI, routing: dict[str, Any]) -> None:
        first, second = (
            ask(client, routing, temperature=1.0, seed=5).choices[0].message.content for _ in "ab"
        )
        assert first == second

    def test_structured_output(self, client: openai.OpenAI, routing: dict[str, Any]) -> None:
        answer = client.chat.completions.create(
            model="demo",
            messages=QUESTION,
            max_tokens=8,
            extra_body={"routing": routing, "structured_outputs": {"choice": ["yes", "no"]}},
        )
        assert answer.choices[0].message.content in ("yes", "no")

    def test_tools(self, client: openai.OpenAI, routing: dict[str, Any]) -> None:
        tool = {
            "type": "function",
            "function": {
                "name": "pick",
                "strict": True,
                "parameters": {
                    "type": "object",
                    "properties": {"digit": {"type": "string", "enum": ["1", "2"]}},
                    "required": ["digit"],
                    "additionalProperties": False,
                },
            },
        }
        answer = ask(
            client,
            routing,
            tools=[tool],
            tool_choice={"type": "function", "function": {"name": "pick"}},
            max_tokens=200,
            # JSON may hold any white space, and this model would write nothing else.
            logit_bias=dict.fromkeys(white_space_tokens(), -100),
        )
        call = answer.choices[0].message.tool_calls[0].function
        assert call.name == "pick"
        assert json.loads(call.arguments)["digit"] in ("1", "2")


def test_prefix_cache_keeps_policies_apart(server: Server) -> None:
    """The same long prompt under two policies, warm: each as in its own cold run."""
    client = server.client()
    prompt = "copy " + "abcdefghij" * 20

    def answer(routing: Any, salt: str) -> tuple[str, int]:
        got = client.completions.create(
            model="demo",
            prompt=prompt,
            max_tokens=8,
            temperature=0,
            extra_body={"cache_salt": salt, **({"routing": routing} if routing else {})},
        )
        return got.choices[0].text, got.usage.prompt_tokens

    routings = [None, SKIP, {"preset": "no-attention-3"}]
    cold = [answer(routing, f"cold-{index}") for index, routing in enumerate(routings)]
    for _ in range(2):
        assert [answer(routing, "shared") for routing in routings] == cold
