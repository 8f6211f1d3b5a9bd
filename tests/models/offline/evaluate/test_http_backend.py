"""Asking a server: what is sent, what comes back, and what can be wrong with it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from support.stub_server import REPORT, Route, Stub, chat, completion, error, models

from sluice.models.offline.evaluate.evaluation import EvaluationError, PolicyRefusedError
from sluice.models.offline.evaluate.http_backend import HttpBackend
from sluice.models.offline.hf_model.examples import Example, read_tasks

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
SAID = [{"role": "system", "content": "be short"}, {"role": "user", "content": "why"}]
USAGE = {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1}
NO_TEMPLATE = "default chat template is no longer allowed, so you must provide a chat template"


def examples(tmp_path: Path, *lines: dict[str, Any]) -> tuple[Example, ...]:
    """Read from a file, so that they know their lines."""
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps({"answer": "x", **line}) + "\n" for line in lines))
    return read_tasks(file)


def test_answers_come_back_in_order(stub: Stub, tmp_path: Path) -> None:
    lines = [{"prompt": "abc"}, {"text": "once"}, {"messages": SAID}] * 7
    backend = HttpBackend(stub.url, "m", concurrency=4)
    replies = backend.answers(examples(tmp_path, *lines), {"effort": 0.5}, 9)
    assert [reply.text for reply in replies] == ["cba", "ecno", "yhw"] * 7
    assert [reply.cut for reply in replies] == [False, True, False] * 7
    assert not any(reply.reports for reply in replies)
    chats, plain = stub.bodies(CHAT), stub.bodies(COMPLETIONS)
    assert {body["prompt"] for body in plain} == {"once"}
    assert sum(body["messages"] == SAID for body in chats) == 7
    assert sum(body["messages"] == [{"role": "user", "content": "abc"}] for body in chats) == 7
    for body in (*chats, *plain):
        sent = {key: body[key] for key in ("model", "temperature", "max_tokens", "routing")}
        assert sent == {
            "model": "m",
            "temperature": 0,
            "max_tokens": 9,
            "routing": {"effort": 0.5},
        }


def test_reports_are_kept(stub: Stub, tmp_path: Path) -> None:
    read = examples(tmp_path, {"prompt": "abc"}, {"text": "once"})
    backend = HttpBackend(stub.url, "m")
    assert [r.reports for r in backend.answers(read, {"report": True}, 9)] == [(REPORT,)] * 2


def test_without_routing_none_is_sent(stub: Stub, tmp_path: Path) -> None:
    read = examples(tmp_path, {"prompt": "abc"})
    HttpBackend(stub.url, "m", reports=False).answers(read, None, 9)
    assert not {"routing", "cache_salt"} & stub.bodies(CHAT)[0].keys()


def test_no_policy_finds_the_prompts_of_another_in_the_prefix_cache(
    stub: Stub, tmp_path: Path
) -> None:
    """It would save the second one the time."""
    chosen = {"text": "once", "choices": ["x", "y"]}
    read = examples(tmp_path, {"prompt": "abc"}, {"prompt": "abcd"}, chosen, chosen)
    backend = HttpBackend(stub.url, "m")
    for routing in (None, {"effort": 0.5}):
        backend.answers(read[:2], routing, 9)
        backend.choices(read[2:], routing)
    for path in (CHAT, COMPLETIONS):
        salts = [body["cache_salt"] for body in stub.bodies(path)]
        first, other = (set(half) for half in (salts[: len(salts) // 2], salts[len(salts) // 2 :]))
        assert len(first) == len(other) == 1
        assert first != other


def test_requests_are_timed(stub: Stub, tmp_path: Path) -> None:
    def slowly(answer: Route, tokens: int) -> Route:
        def route(body: dict[str, Any]) -> tuple[int, Any]:
            time.sleep(0.05)
            status, found = answer(body)
            return status, {**found, "usage": {**USAGE, "completion_tokens": tokens}}

        return route

    stub.routes[CHAT], stub.routes[COMPLETIONS] = slowly(chat, 3), slowly(completion, 0)
    chosen = {"text": "once", "choices": ["x", "y"]}
    answered, choice = examples(tmp_path, {"prompt": "abc"}, chosen)
    backend = HttpBackend(stub.url, "m")
    (answer,) = backend.answers([answered], None, 9)
    assert answer.seconds >= 0.05
    assert answer.tokens == 3
    (read,) = backend.choices([choice], None)
    assert read.seconds >= 0.1
    assert read.tokens == 0


def test_the_likeliest_choice_by_the_tokens_behind_the_prompt(stub: Stub, tmp_path: Path) -> None:
    """The stub's log probability of a token is minus a hundredth of its number."""
    choices = ["zz", "~", "aaa"]
    lines = [{"prompt": "abc"}, {"text": "once"}, {"messages": SAID}]
    read = examples(tmp_path, *({**x, "choices": choices, "answer": "zz"} for x in lines))
    backend = HttpBackend(stub.url, "m")
    sums = backend.choices(read, {"report": True})
    assert [reply.text for reply in sums] == ["~"] * 3
    assert [len(reply.reports) for reply in sums] == [3] * 3
    means = backend.choices(read, None, per_token=True)
    assert [reply.text for reply in means] == ["aaa"] * 3
    asked = {tuple(body["prompt"]) for body in stub.bodies(COMPLETIONS)}
    starts = ([2, *b"abc"], [1, *b"once"], [2, *b"why"])
    assert asked == {(*start, *choice.encode()) for start in starts for choice in choices}
    for body in stub.bodies(COMPLETIONS):
        assert (body["echo"], body["logprobs"], body["max_tokens"]) == (True, 0, 0)
    assert all("model" not in body for body in stub.bodies(TOKENIZE)), "a preset has no tokenizer"


def test_a_server_is_looked_at_first(stub: Stub) -> None:
    backend = HttpBackend.connect(f"{stub.url}/", None, "k", 3)
    assert backend == HttpBackend(stub.url, "m", "k", 3, reports=True, template=True)
    assert HttpBackend.connect(stub.url, "m", "k", 3) == backend


def test_a_server_of_somebody_else(stub: Stub, tmp_path: Path) -> None:
    del stub.routes["/v1/routing/capabilities"], stub.routes[TOKENIZE]
    backend = HttpBackend.connect(stub.url, None, "k", 3)
    assert (backend.reports, backend.template) == (False, True)
    (chosen,) = examples(tmp_path, {"prompt": "abc", "choices": ["x", "y"]})
    with pytest.raises(EvaluationError, match="/tokenize is not there"):
        backend.choices([chosen], None)


def test_presets_are_no_models_to_choose_from(stub: Stub) -> None:
    _, listed = models("m", "m@fast")({})
    listed["data"][1]["parent"] = "m"
    stub.routes["/v1/models"] = lambda body: (200, listed)
    assert HttpBackend.connect(stub.url, None, "k", 3).model == "m"
    assert HttpBackend.connect(stub.url, "m@fast", "k", 3).model == "m@fast"


def test_a_model_without_chat_template(stub: Stub, tmp_path: Path) -> None:
    refuse = error(400, NO_TEMPLATE)
    tokenize = stub.routes[TOKENIZE]
    stub.routes[TOKENIZE] = lambda body: refuse if "messages" in body else tokenize(body)
    backend = HttpBackend.connect(stub.url, None, "k", 3)
    assert not backend.template
    prompt, said = examples(tmp_path, {"prompt": "abc"}, {"messages": SAID})
    assert backend.answers([prompt], None, 9)[0].text == "cba"
    assert stub.bodies(COMPLETIONS)[0]["prompt"] == "abc"
    with pytest.raises(EvaluationError, match=r"tasks.jsonl:2: messages need a chat template"):
        backend.answers([said], None, 9)


@pytest.mark.parametrize(
    ("url", "model", "complaint"),
    [
        ("http://127.0.0.1:9/v1", None, "no server answers"),
        ("{stub}/completions", None, "up to and including /v1"),
        ("{stub}", "x", "serves m, not x"),
    ],
)
def test_no_such_server_or_model(stub: Stub, url: str, model: str | None, complaint: str) -> None:
    with pytest.raises(EvaluationError, match=complaint):
        HttpBackend.connect(url.format(stub=stub.url), model, "k", 3)


def test_which_of_several_models(stub: Stub) -> None:
    stub.routes["/v1/models"] = models("m", "n")
    with pytest.raises(EvaluationError, match="serves m, n: choose by --model"):
        HttpBackend.connect(stub.url, None, "k", 3)


def test_another_key_is_wanted(stub: Stub) -> None:
    stub.routes["/v1/models"] = lambda body: (401, {"error": "Unauthorized"})
    with pytest.raises(EvaluationError, match="another --api-key"):
        HttpBackend.connect(stub.url, None, "k", 3)


@pytest.mark.parametrize("status", [400, 403])
def test_a_refused_policy_names_its_field(stub: Stub, tmp_path: Path, status: int) -> None:
    refused = error(status, "layer 9 does not exist", "routing.depth.skip.blocks.0")
    stub.routes[CHAT] = lambda body: refused
    with pytest.raises(PolicyRefusedError) as raised:
        HttpBackend(stub.url, "m").answers(examples(tmp_path, {"prompt": "abc"}), {}, 9)
    assert raised.value.param == "routing.depth.skip.blocks.0"
    assert str(raised.value) == "routing.depth.skip.blocks.0: layer 9 does not exist"


def test_a_refused_preset_of_a_model_id(stub: Stub, tmp_path: Path) -> None:
    stub.routes[CHAT] = lambda body: error(400, "preset 'x' does not exist", "model")
    with pytest.raises(PolicyRefusedError, match="model: preset 'x'"):
        HttpBackend(stub.url, "m@x").answers(examples(tmp_path, {"prompt": "abc"}), {}, 9)


def test_a_refused_example_names_its_line(stub: Stub, tmp_path: Path) -> None:
    long = error(400, "maximum context length is 8", "input_tokens")
    chat = stub.routes[CHAT]
    stub.routes[CHAT] = lambda body: long if "too" in str(body) else chat(body)
    read = examples(tmp_path, {"prompt": "abc"}, {"prompt": "too long"})
    with pytest.raises(EvaluationError, match=r"tasks.jsonl:2: maximum context length is 8"):
        HttpBackend(stub.url, "m").answers(read, {}, 9)


def test_a_server_that_breaks(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    stub.routes[CHAT] = lambda body: error(500, "engine died")
    with pytest.raises(EvaluationError, match="answers 500: engine died"):
        HttpBackend(stub.url, "m").answers(examples(tmp_path, {"prompt": "abc"}), {}, 9)


def test_a_server_without_log_probabilities_of_prompts(stub: Stub, tmp_path: Path) -> None:
    completion = stub.routes[COMPLETIONS]

    def silent(body: dict[str, Any]) -> tuple[int, Any]:
        status, wire = completion(body)
        wire["choices"][0]["logprobs"] = None
        return status, wire

    stub.routes[COMPLETIONS] = silent
    (chosen,) = examples(tmp_path, {"prompt": "abc", "choices": ["x", "y"]})
    with pytest.raises(EvaluationError, match="no log probabilities of prompts"):
        HttpBackend(stub.url, "m").choices([chosen], None)


def test_a_choice_without_tokens_names_its_line(stub: Stub, tmp_path: Path) -> None:
    tokenize = stub.routes[TOKENIZE]
    stub.routes[TOKENIZE] = lambda body: (
        (200, {"tokens": []}) if body.get("prompt") == "y" else tokenize(body)
    )
    (chosen,) = examples(tmp_path, {"prompt": "abc", "choices": ["x", "y"]})
    with pytest.raises(EvaluationError, match=r"tasks.jsonl:1: choice 'y' has no tokens"):
        HttpBackend(stub.url, "m").choices([chosen], None)


def test_somebody_watches(stub: Stub, tmp_path: Path) -> None:
    seen: list[int] = []
    backend = HttpBackend(stub.url, "m", answered=lambda: seen.append(1))
    backend.answers(examples(tmp_path, *[{"prompt": "abc"}] * 5), None, 9)
    assert len(seen) == 5
