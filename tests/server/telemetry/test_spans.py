"""Spans of the real server at a real OTLP receiver: what routed ones carry, and others do not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import openai
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from support.serving import Server, running_server

ARRIVAL_SECONDS = 60
OURS = "sluice."


class Receiver(rpc.TraceServiceServicer):  # type: ignore[misc]
    """Keeps every span that is exported to it."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return service.ExportTraceServiceResponse()

    def of_request(self, answer: str, count: int = 1) -> list[Span]:
        """Spans of the request with this answer's id, once there are so many."""
        deadline = time.monotonic() + ARRIVAL_SECONDS
        while time.monotonic() < deadline:
            found = [
                span
                for span in self.spans
                if span.name == "llm_request"
                and str(values(span)["gen_ai.request.id"]).startswith(answer)
            ]
            if len(found) >= count:
                assert len(found) == count
                return found
            time.sleep(0.05)
        pytest.fail(f"no span of {answer} among {[span.name for span in self.spans]}")


def value(given: AnyValue) -> Any:
    kind = given.WhichOneof("value")
    if kind == "array_value":
        return [value(part) for part in given.array_value.values]
    return getattr(given, str(kind))


def values(span: Span) -> dict[str, Any]:
    return {attribute.key: value(attribute.value) for attribute in span.attributes}


def ours(span: Span) -> dict[str, Any]:
    return {name: own for name, own in values(span).items() if name.startswith(OURS)}


@pytest.fixture(scope="module")
def receiver() -> Iterator[tuple[Receiver, str]]:
    kept = Receiver()
    server = grpc.server(ThreadPoolExecutor(2))
    rpc.add_TraceServiceServicer_to_server(kept, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield kept, f"http://127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture(scope="module")
def traced(
    receiver: tuple[Receiver, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("traced") / "log"
    arguments = ["--enforce-eager", "--dtype", "float32", "--otlp-traces-endpoint", receiver[1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        with running_server(log, *arguments) as running:
            yield running


@pytest.fixture
def spans(receiver: tuple[Receiver, str]) -> Receiver:
    return receiver[0]


@pytest.fixture
def caller(traced: Server) -> openai.OpenAI:
    return traced.client()


def ask(caller: openai.OpenAI, routing: dict[str, Any] | None, **options: Any) -> Any:
    body = {} if routing is None else {"routing": routing}
    return caller.chat.completions.create(
        **{"model": "demo", "max_tokens": 6, "temperature": 0, **options},
        messages=[{"role": "user", "content": "copy hello"}],
        extra_body=body,
    )


def test_a_routed_request_tells_its_policy_and_what_ran(
    caller: openai.OpenAI, spans: Receiver
) -> None:
    exits = {"method": "confidence", "threshold": 0.9, "layers": [2, 4]}
    skip = {"attention": [1], "mlp": [6, 7]}
    routing = {"depth": {"skip": skip, "exit": exits, "phase": "decode"}, "report": True}
    answer = ask(caller, routing)
    (span,) = spans.of_request(answer.id)
    found, report = ours(span), answer.routing
    digest = found.pop("sluice.policy.digest")
    assert len(digest) == 16
    assert found == {
        "sluice.preset": "custom",
        "sluice.policy.skip.attention": 1,
        "sluice.policy.skip.mlp": 2,
        "sluice.policy.skip.phase": "decode",
        "sluice.policy.exit.method": "confidence",
        "sluice.compute_fraction": report["compute_fraction"],
        "sluice.generated.compute_fraction": report["generated"]["compute_fraction"],
        "sluice.generated.mean_layers": report["generated"]["mean_layers"],
        "sluice.generated.tokens": report["generated"]["tokens"],
        "sluice.exits": [layer["tokens"] for layer in report["exits"]],
    }
    assert sum(found["sluice.exits"]) > 0
    # The same policy has the same digest, with or without a report.
    again = ask(caller, {**routing, "report": False})
    assert ours(spans.of_request(again.id)[0])["sluice.policy.digest"] == digest


def test_a_routed_span_is_vllms_own_otherwise(caller: openai.OpenAI, spans: Receiver) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace}-{parent}-01"}
    found = []
    for routing in (None, {"effort": 0.5}):
        answer = ask(caller, routing, extra_headers=headers, stop=None)
        (span,) = spans.of_request(answer.id)
        assert span.trace_id.hex() == trace
        assert span.parent_span_id.hex() == parent
        assert span.kind == Span.SPAN_KIND_SERVER
        own = values(span)
        assert own["gen_ai.usage.completion_tokens"] == answer.usage.completion_tokens
        took = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert took >= own["gen_ai.latency.time_to_first_token"] > 0
        found.append(own.keys() - ours(span).keys())
    assert found[0] == found[1]


def test_a_request_without_routing_has_no_policy(caller: openai.OpenAI, spans: Receiver) -> None:
    (span,) = spans.of_request(ask(caller, None).id)
    assert ours(span) == {}


def test_a_preset_and_an_effort_are_named(caller: openai.OpenAI, spans: Receiver) -> None:
    light = ours(spans.of_request(ask(caller, None, model="demo@light").id)[0])
    assert light["sluice.preset"] == "light"
    assert light["sluice.policy.effort"] == 0.625
    own = ours(spans.of_request(ask(caller, {"effort": 0.5}).id)[0])
    assert (own["sluice.preset"], own["sluice.policy.effort"]) == ("custom", 0.5)
    assert own["sluice.compute_fraction"] < 1


def test_expert_controls_and_methods_are_named(caller: openai.OpenAI, spans: Receiver) -> None:
    experts = {"deactivate": [{"layer": 3, "experts": [0, 2]}], "top_k": 2}
    answer = ask(caller, {"experts": {**experts, "protect_super_experts": False}, "report": True})
    found = ours(spans.of_request(answer.id)[0])
    assert found["sluice.policy.experts"] == ["masked", "protect", "top_k"]
    assert found["sluice.experts.active_mean"] == answer.routing["experts"]["active_mean"]
    assert found["sluice.experts.masked"] == answer.routing["experts"]["masked"] > 0
    adaptive = {"method": "similarity", "budget": 0.6}
    found = ours(spans.of_request(ask(caller, {"depth": {"adaptive": adaptive}}).id)[0])
    assert found["sluice.policy.adaptive.method"] == "similarity"


def test_streams_and_samples(caller: openai.OpenAI, spans: Receiver) -> None:
    *_, last = ask(caller, {"effort": 0.5, "report": True}, stream=True)
    found = ours(spans.of_request(last.id)[0])
    assert found["sluice.compute_fraction"] == last.routing["compute_fraction"]
    answer = ask(caller, {"effort": 0.5, "report": True}, n=2, temperature=1)
    pair = spans.of_request(answer.id, count=2)
    tokens = answer.routing["generated"]["tokens"]
    assert [ours(span)["sluice.generated.tokens"] for span in pair] == [tokens] * 2


def test_a_stream_that_its_client_leaves_holds_up_nothing(
    caller: openai.OpenAI, spans: Receiver
) -> None:
    stream = ask(caller, {"effort": 0.5}, stream=True, max_tokens=900)
    next(iter(stream))
    stream.close()
    answer = ask(caller, {"effort": 0.5})
    assert ours(spans.of_request(answer.id)[0])["sluice.policy.effort"] == 0.5
