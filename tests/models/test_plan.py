"""Step plans against a brute-force walk over tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sluice.models.depth.skip import ATTENTION, DECODE, MLP, PREFILL
from sluice.models.plan import EXECUTED, FILLED, SKIPPED, StepRequests, build_plan
from sluice.models.policy import Phase, RoutingPolicy, SkipSet
from sluice.models.policy_table import PolicyTable

LAYERS = 4
layer_lists = st.lists(st.integers(0, LAYERS - 1), max_size=LAYERS).map(tuple)
skips = st.builds(
    SkipSet.of,
    blocks=layer_lists,
    attention=layer_lists,
    mlp=layer_lists,
    phase=st.sampled_from(Phase),
)
# (policy, scheduled, computed, prompt) of one request.
request_rows = st.tuples(skips, st.integers(1, 9), st.integers(0, 12), st.integers(1, 12))


@given(st.lists(request_rows, min_size=1, max_size=6))
def test_plan_equals_the_walk(drawn: list[tuple[SkipSet, int, int, int]]) -> None:
    table = PolicyTable(LAYERS)
    rows = np.array([table.acquire(RoutingPolicy(skip)) for skip, *_ in drawn])
    scheduled, computed, prompt = (np.array([d[i] for d in drawn]) for i in (1, 2, 3))
    plan = build_plan(StepRequests.of(rows, scheduled, computed, prompt), table.masks)
    counts = np.zeros_like(plan.counts)
    for layer in range(LAYERS):
        token = 0
        attention, fill, mlp = [], [], []
        for index, (skip, length, start, limit) in enumerate(drawn):
            for position in range(start, start + length):
                phase = PREFILL if position < limit else DECODE
                now = skip.phase in (Phase.BOTH, (Phase.PREFILL, Phase.DECODE)[phase])
                later = skip.phase in (Phase.BOTH, Phase.DECODE)
                if not (now and layer in skip.attention):
                    attention.append(token)
                    counts[layer, ATTENTION, EXECUTED] += 1
                elif phase == PREFILL and not later:
                    fill.append(token)
                    counts[layer, ATTENTION, FILLED] += 1
                else:
                    counts[layer, ATTENTION, SKIPPED] += 1
                if now and layer in skip.mlp:
                    counts[layer, MLP, SKIPPED] += 1
                else:
                    mlp.append(token)
                    counts[layer, MLP, EXECUTED] += 1
                token += 1
            assert plan.request_counts[index].sum() == 2 * LAYERS * length
        planned = plan.layers[layer]
        assert planned.attention.tokens.tolist() == attention
        assert planned.fill.tokens.tolist() == fill
        assert planned.mlp.tokens.tolist() == mlp
        assert planned.mlp.everything == (len(mlp) == token)
    assert (plan.counts == counts).all()
    assert (plan.request_counts.sum(axis=0) == counts).all()
    assert plan.full_depth == (counts[..., EXECUTED].sum() == counts.sum())


def test_rows_of_a_recomputed_request_end_where_its_last_row_is() -> None:
    """Prompt and generated tokens in one step: the generated ones trail what only prompts run."""
    table = PolicyTable(LAYERS)
    skip = SkipSet.of(attention=(1,), phase=Phase.DECODE)
    rows = np.array([0, table.acquire(RoutingPolicy(skip))])
    step = StepRequests.of(rows, np.array([2, 7]), np.array([0, 0]), np.array([2, 4]))
    attention = build_plan(step, table.masks).layers[1].attention
    assert attention.requests.tolist() == [0, 1]
    assert attention.lengths.tolist() == [2, 4]
    assert attention.trailing.tolist() == [0, 3]


def test_sub_layers_with_equal_rows_share_one_object() -> None:
    table = PolicyTable(LAYERS)
    rows = np.array([0, table.acquire(RoutingPolicy(SkipSet.of(blocks=(1, 2))))])
    ones = np.ones(2, dtype=np.int64)
    plan = build_plan(StepRequests.of(rows, ones, ones, ones), table.masks)
    assert plan.layers[1].attention is plan.layers[2].mlp
    assert plan.layers[0].attention is plan.layers[3].mlp
