"""Spans of routed requests wait for what ran; those of others never wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sluice.models.policy.extra_args import EXTRA_ARGS_KEY, RoutingExtraArgs
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.vllm_adapter.patches import tracing
from sluice.models.vllm_adapter.patches.tracing import RequestSpans
from sluice.models.vllm_adapter.patching import SeamMovedError


class Processor:
    """Makes a span of each finished request, as vLLM's output processor does."""

    def __init__(self, instrument: Any) -> None:
        self.request_states: dict[str, Any] = {}
        self._instrument = instrument

    def add_request(self, request: Any, prompt: str | None) -> None:
        self.request_states[request.request_id] = State()

    def do_tracing(self, output: Any, state: Any, stats: Any) -> None:
        self._instrument(span_name="llm_request", start_time=7, attributes={"own": output})


class State:
    """vLLM's state of a request."""


class Tracing:
    """An engine client's tracing with our seam before it, and what it has exported."""

    def __init__(self) -> None:
        self.exported: list[dict[str, Any]] = []
        self.spans = RequestSpans(lambda **span: self.exported.append(span))
        instrument = tracing._holding(self._stock)
        self._processor = Processor(instrument)
        self._add = self.spans._noting(self._processor, self._processor.add_request)
        self._trace = self.spans._delaying(self._processor.do_tracing)

    def _stock(self, name: str, start: int, end: Any, attributes: Any, *rest: Any) -> None:
        self.exported.append({"span_name": name, "attributes": attributes, "end_time": end})

    def add(self, name: str, record: str | None) -> None:
        extra = record and RoutingExtraArgs(RoutingPolicy(), record)
        extra_args = {EXTRA_ARGS_KEY: extra.encode()} if extra else None
        params = SimpleNamespace(extra_args=extra_args)
        self._add(SimpleNamespace(request_id=name, sampling_params=params), "prompt")

    def finish(self, name: str) -> None:
        self._trace(name, self._processor.request_states.pop(name), None)

    @property
    def attributes(self) -> list[dict[str, Any]]:
        return [span["attributes"] for span in self.exported]


@pytest.fixture
def traced() -> Tracing:
    return Tracing()


def test_a_span_waits_for_the_rest_of_its_attributes(traced: Tracing) -> None:
    traced.spans.open("key", {"sluice.preset": "fast"})
    traced.add("a", "key")
    traced.finish("a")
    assert traced.exported == []
    traced.spans.close("key", {"sluice.compute_fraction": 0.5})
    (span,) = traced.exported
    assert span["attributes"] == {
        "own": "a",
        "sluice.preset": "fast",
        "sluice.compute_fraction": 0.5,
    }
    assert (span["span_name"], span["start_time"]) == ("llm_request", 7)


def test_the_span_ends_when_the_request_did(
    traced: Tracing, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000]
    monkeypatch.setattr(tracing.time, "time_ns", lambda: now[0])
    traced.spans.open("key", {})
    traced.add("a", "key")
    traced.finish("a")
    now[0] += 500
    traced.spans.close("key", {})
    assert traced.exported[0]["end_time"] == 1000


def test_a_span_without_a_ticket_never_waits(traced: Tracing) -> None:
    traced.spans.open("key", {"sluice.preset": "fast"})
    traced.add("plain", None)
    traced.finish("plain")
    assert traced.attributes == [{"own": "plain"}]


def test_samples_of_a_request_have_a_span_each(traced: Tracing) -> None:
    traced.spans.open("key", {})
    for name in ("0", "1"):
        traced.add(name, "key")
    traced.finish("0")
    traced.finish("1")
    traced.spans.close("key", {"sluice.generated.tokens": 8})
    own = [(span["own"], span["sluice.generated.tokens"]) for span in traced.attributes]
    assert own == [("0", 8), ("1", 8)]


def test_a_span_that_comes_after_the_answer_has_them_too(traced: Tracing) -> None:
    """The client has left, and the last token overtook the abort."""
    traced.spans.open("key", {"sluice.preset": "fast"})
    traced.add("late", "key")
    traced.spans.close("key", {})
    assert traced.exported == []
    traced.finish("late")
    assert traced.attributes == [{"own": "late", "sluice.preset": "fast"}]


def test_nothing_is_kept_of_requests_that_never_finish(traced: Tracing) -> None:
    traced.spans.open("key", {})
    traced.add("aborted", "key")
    traced._processor.request_states.clear()
    traced.spans.close("key", {})
    assert traced.spans._waiting == {}
    assert len(traced.spans._of_state) == 0


def client(endpoint: str | None, processor: Any = None) -> Any:
    config = SimpleNamespace(observability_config=SimpleNamespace(otlp_traces_endpoint=endpoint))
    return SimpleNamespace(vllm_config=config, output_processor=processor)


def test_without_the_flag_nothing_is_touched() -> None:
    processor = Processor(None)
    assert RequestSpans.attach(client(None, processor)) is None
    assert vars(processor).keys() == {"request_states", "_instrument"}


def test_a_seam_that_has_moved_stops_the_start() -> None:
    with pytest.raises(SeamMovedError, match="`add_request` on the engine client's output"):
        RequestSpans.attach(client("http://127.0.0.1:1"))
