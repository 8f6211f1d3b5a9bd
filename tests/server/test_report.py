"""Reports in JSON answers and in event streams cut anywhere."""

from __future__ import annotations

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from sluice.models.policy import RoutingPolicy
from sluice.server.report import EventSplitter, build_report, is_usage_chunk, with_report

STREAM = (
    b'data: {"choices":[{"delta":{"content":"a\\n\\nb \\"usage\\""}}]}\n\n'
    b": keep-alive\n\n"
    b'data: {"choices":[],"usage":{"total_tokens":3}}\n\n'
    b"data: [DONE]\n\n"
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_events_survive_any_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    splitter = EventSplitter()
    events = [
        event
        for start, end in itertools.pairwise(edges)
        for event in splitter.feed(STREAM[start:end])
    ]
    assert b"".join(events) == STREAM
    assert len(events) == 4
    assert splitter.flush() == b""
    assert [is_usage_chunk(event) for event in events] == [False, False, True, False]


def test_report_joins_an_event_and_an_answer() -> None:
    event = with_report(b'data: {"id":"\xc3\xa9","choices":[]}\n\n', {"a": 1})
    assert event == 'data: {"id":"é","choices":[],"routing":{"a":1}}\n\n'.encode()
    assert json.loads(with_report(b'{"id":1}', {"a": 1})) == {"id": 1, "routing": {"a": 1}}


def test_a_lost_record_is_said() -> None:
    report = build_report(RoutingPolicy(), None)
    assert report["warnings"]
    assert "layers" not in report
