"""Reports in JSON answers and in event streams cut anywhere."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.models.policy.policy import RoutingPolicy
from sluice.models.telemetry.report import build_report
from sluice.models.telemetry.request_record import ExpertUse, RoutingRecord
from sluice.server.http.protocols import api_of
from sluice.server.http.sse import Event, EventSplitter

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
    assert b"".join(event.encode() for event in events) == STREAM
    assert len(events) == 4
    assert splitter.flush() == b""
    closes = api_of("/v1/completions").closes
    assert [closes(event) for event in events] == [False, False, True, False]


@pytest.mark.parametrize(
    ("raw", "name", "data"),
    [
        (b'data: {"a":1}', b"", b'{"a":1}'),
        (b'event: message_stop\ndata: {"a":1}', b"message_stop", b'{"a":1}'),
        (b": keep-alive", b"", b""),
        (b"", b"", b""),
    ],
)
def test_an_event_is_its_head_and_its_data(raw: bytes, name: bytes, data: bytes) -> None:
    event = Event.read(raw)
    assert (event.name, event.data) == (name, data)
    assert event.encode() == raw + b"\n\n"


def test_an_event_gets_other_data() -> None:
    event = Event.read(b"event: x\ndata: {}").with_data({"id": "é"})
    assert event.encode() == 'event: x\ndata: {"id":"é"}\n\n'.encode()


def test_a_lost_record_is_said() -> None:
    report = build_report(RoutingPolicy(), None)
    assert report["warnings"]
    assert "layers" not in report


RECORD = RoutingRecord(
    counts=np.array(
        [
            [[[5, 0, 0], [5, 0, 0]], [[4, 0, 1], [3, 2, 0]]],
            [[[3, 0, 0], [2, 1, 0]], [[1, 0, 2], [1, 2, 0]]],
        ]
    ),
    exits=np.array([2, 1]),
    compute_fraction=0.87654321,
    generated_compute_fraction=0.5833333333,
)


def test_phases_are_summed_and_generated_tokens_told_apart() -> None:
    report = build_report(RoutingPolicy(), RECORD)
    assert report["layers"] == [
        {
            "layer": 0,
            "attention": {"executed": 8, "skipped": 0, "filled": 0},
            "mlp": {"executed": 7, "skipped": 1, "filled": 0},
        },
        {
            "layer": 1,
            "attention": {"executed": 5, "skipped": 0, "filled": 3},
            "mlp": {"executed": 4, "skipped": 4, "filled": 0},
        },
    ]
    assert report["exits"] == [{"layer": 0, "tokens": 2}, {"layer": 1, "tokens": 1}]
    # 3 + 2 + 1 + 1 sub-layers of 3 tokens, two a layer.
    assert report["generated"] == {
        "tokens": 3,
        "mean_layers": round(7 / 6, 6),
        "compute_fraction": 0.583333,
    }
    assert report["compute_fraction"] == 0.876543
    assert "mask" not in report
    json.dumps(report, allow_nan=False)


def test_an_answer_of_one_token_has_no_generated_rows() -> None:
    record = replace(
        RECORD,
        counts=np.stack([RECORD.counts[0], np.zeros_like(RECORD.counts[1])]),
        exits=np.array([0, 0]),
        generated_compute_fraction=1.0,
    )
    generated = build_report(RoutingPolicy(), record)["generated"]
    assert generated == {"tokens": 0, "mean_layers": None, "compute_fraction": 1.0}


def test_a_decided_mask_is_reported() -> None:
    mask = {"attention": [1], "mlp": [1]}
    assert build_report(RoutingPolicy(), replace(RECORD, mask=mask))["mask"] == mask


EXPERTS = ExpertUse(3.123456789, 4, None, neighbour_dependent=False, weak_tokens=5)


def test_experts_are_reported_rounded() -> None:
    report = build_report(RoutingPolicy(), replace(RECORD, experts=EXPERTS))
    assert report["experts"] == {
        "active_mean": 3.123457,
        "masked": 4,
        "loaded_per_step": None,
        "neighbour_dependent": False,
        "weak": {"tokens": 5},
    }
    assert report["warnings"] == []
    assert "experts" not in build_report(RoutingPolicy(), RECORD)


def test_an_answer_that_depended_on_its_neighbours_says_so() -> None:
    experts = replace(EXPERTS, neighbour_dependent=True)
    (warning,) = build_report(RoutingPolicy(), replace(RECORD, experts=experts))["warnings"]
    assert "depended on its neighbours" in warning
