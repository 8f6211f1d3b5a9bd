"""What no client may write, wherever it stands, and what the search costs."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from sluice.models.routing.errors import RoutingError
from sluice.server.reserved import refuse_reserved


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"vllm_xargs": {"sluice": "{}"}}, "vllm_xargs.sluice"),
        ({"sampling_params": {"extra_args": {"sluice": 1}}}, "sampling_params.extra_args.sluice"),
        ({"a": [1, [{"extra_args": {"sluice": 1}}]]}, "a.1.0.extra_args.sluice"),
        ({"cache_salt": "sluice-0123"}, "cache_salt"),
        ({"cache_salt": "sluice-generated-cmpl-1"}, "cache_salt"),
        ({"prompts": [{"cache_salt": "sluice-"}]}, "prompts.0.cache_salt"),
    ],
)
def test_what_is_ours_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RoutingError) as caught:
        refuse_reserved(body)
    assert (caught.value.param, caught.value.reason) == (param, "reserved_argument")


@pytest.mark.parametrize(
    "body",
    [
        {"vllm_xargs": {"other": 1}},
        {"sluice": {"extra_args": 1}},
        {"extra_args": ["sluice"]},
        {"cache_salt": "mine-sluice-"},
        {"cache_salt": ["sluice-x"]},
        {"messages": [{"role": "user", "content": "cache_salt: sluice-x"}]},
    ],
)
def test_what_is_the_clients_passes(body: dict[str, Any]) -> None:
    refuse_reserved(body)


def test_a_long_key_over_many_values_costs_nothing() -> None:
    body = {"k" * 200_000: {str(number): {} for number in range(2500)}}
    tracemalloc.start()
    try:
        refuse_reserved(body)
        assert tracemalloc.get_traced_memory()[1] < 2 * 1024**2
    finally:
        tracemalloc.stop()
    with pytest.raises(RoutingError) as caught:
        refuse_reserved({"k" * 200_000: {"extra_args": {"sluice": 1}}})
    assert len(str(caught.value.body())) < 2000
