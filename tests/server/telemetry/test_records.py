"""Records reach the answers that they belong to, however these end, and nobody else."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest
from support.serving import Server

SKIPS = {"depth": {"skip": {"mlp": [6]}}, "report": True}
LIMIT_SECONDS = 60


def sent(server: Server, path: str, **body: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last object with a report that is sent, and the report."""
    asked = {"model": "demo", "temperature": 0, "routing": SKIPS, **body}
    status, raw = server.post(path, json.dumps(asked).encode())
    assert status == 200, raw
    if not body.get("stream"):
        whole = json.loads(raw)
        return whole, whole["routing"]
    lines = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: {")]
    (last,) = [event for event in map(json.loads, lines) if "routing" in event]
    return last, last["routing"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_answer_that_a_stop_string_ends(server: Server, path: str, stream: bool) -> None:
    """The API server knows before the engine does."""
    question: dict[str, Any] = {"prompt": "copy hello"}
    if "chat" in path:
        question = {"messages": [{"role": "user", "content": "copy hello"}]}
    question |= {"max_tokens": 8, "ignore_eos": True}
    free, _ = sent(server, path, **question)
    choice = free["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    ended = {**question, "stop": [text[len(text) // 2]], "stream": stream}
    if stream:
        ended["stream_options"] = {"include_usage": True}
    cut, report = sent(server, path, **ended)
    assert cut["usage"]["completion_tokens"] < 8
    assert report["warnings"] == []
    assert report["layers"][6]["mlp"]["skipped"] > 0
    assert report["generated"]["tokens"] >= cut["usage"]["completion_tokens"] - 1


def test_samples_share_a_record(server: Server) -> None:
    answer, report = sent(
        server,
        "/v1/completions",
        prompt=["copy hello", "sort 4 2 9"],
        n=2,
        temperature=1,
        max_tokens=6,
        ignore_eos=True,
    )
    assert len(answer["choices"]) == 4
    assert report["generated"]["tokens"] == 4 * 5
    assert answer["usage"]["completion_tokens"] == 4 * 6


def test_clients_see_reports_only(server: Server) -> None:
    for stream in (False, True):
        answer, _ = sent(server, "/v1/completions", prompt="copy hello", stream=stream)
        assert answer.get("kv_transfer_params") is None
        status, raw = server.post(
            "/v1/completions",
            json.dumps({"model": "demo", "prompt": "copy", "stream": stream}).encode(),
        )
        assert status == 200
        assert b"routing" not in raw
        assert b'"kv_transfer_params":{' not in raw


def test_what_an_abandoned_request_ran_is_counted(server: Server, client: openai.OpenAI) -> None:
    def ran() -> tuple[float, float]:
        samples = server.samples()
        count = samples["sluice_request_compute_fraction_count", frozenset()]
        exits = sum(samples[key] for key in samples if key[0] == "sluice_exit_tokens_total")
        return count, exits

    count, exits = ran()
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "copy hello"}],
        stream=True,
        max_tokens=900,
        extra_body={"ignore_eos": True, "routing": {"depth": {"skip": {"mlp": [6]}}}},
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + LIMIT_SECONDS
    while ran()[0] == count and time.monotonic() < deadline:
        pass
    assert ran()[0] == count + 1
    assert exits < ran()[1] < exits + 900
