"""Step plans against a brute-force walk over tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sluice.models.depth.masks import DepthMask, MaskTable, Segment, phase_masks
from sluice.models.engine.plan import build_plan
from sluice.models.policy.axes import ATTENTION, DECODE, EXECUTED, FILLED, MLP, PREFILL, SKIPPED
from sluice.models.policy.policy import Phase, SkipSet
from sluice.models.telemetry.step_counts import count_outcomes

LAYERS = 4
flags = st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS)


@st.composite
def masks(draw: st.DrawFn) -> DepthMask:
    attention, mlp, fill = (np.array(draw(flags)) for _ in range(3))
    return DepthMask(np.stack([attention, mlp], axis=1), fill & attention)


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Segment], list[DepthMask]]:
    """Segments of a few requests, prompt tokens before generated ones."""
    palette = [DepthMask.full(LAYERS), *draw(st.lists(masks(), max_size=4))]
    segments = []
    for request in range(draw(st.integers(1, 4))):
        phases = sorted(draw(st.lists(st.sampled_from([PREFILL, DECODE]), min_size=1, max_size=3)))
        for phase in phases:
            mask = draw(st.integers(0, len(palette) - 1))
            pending = phase == DECODE and draw(st.integers(0, 4)) == 0
            segments.append(Segment(request, phase, mask, draw(st.integers(1, 5)), pending))
    return segments, palette


@given(steps())
def test_plan_equals_the_walk(step: tuple[list[Segment], list[DepthMask]]) -> None:
    segments, palette = step
    requests = segments[-1].request + 1
    table = MaskTable(LAYERS)
    rows = [table.acquire(mask) for mask in palette]
    segments = [s._replace(mask=rows[s.mask]) for s in segments]
    plan = build_plan(segments, requests, table.skip, table.fill)
    outcomes, exits = count_outcomes(np.array(segments), requests, table.skip, table.fill)
    tokens = [s for s in segments for _ in range(s.length)]
    assert plan.shape.requests.tolist() == [s.request for s in tokens]
    assert plan.shape.scheduled.tolist() == [i for i, s in enumerate(tokens) if not s.pending]
    expected = np.zeros_like(outcomes)
    for layer in range(LAYERS):
        attention, fill, mlp = [], [], []
        for row, s in enumerate(tokens):
            skip, filled = table.skip[s.mask, layer], table.fill[s.mask, layer]
            for module, ran in ((ATTENTION, attention), (MLP, mlp)):
                outcome = SKIPPED if skip[module] else EXECUTED
                if module == ATTENTION and filled:
                    outcome = FILLED
                    fill.append(row)
                if outcome == EXECUTED:
                    ran.append(row)
                if outcome == EXECUTED or not s.pending:
                    expected[s.request, s.phase, layer, module, outcome] += 1
        planned = plan.layers[layer]
        assert planned.attention.tokens.tolist() == attention
        assert planned.fill.tokens.tolist() == fill
        assert planned.mlp.tokens.tolist() == mlp
        assert planned.mlp.everything == (len(mlp) == len(tokens))
    assert (outcomes == expected).all()
    generated = [s for s in tokens if s.phase == DECODE and not s.pending]
    assert exits.sum() == len(generated)
    assert plan.full_depth == all(not table.skip[s.mask].any() for s in tokens)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.data())
def test_runs_are_adjacent_tokens_of_one_request(lengths: list[int], data: st.DataObject) -> None:
    segments = [Segment(i, PREFILL, 0, n) for i, n in enumerate(lengths)]
    table = MaskTable(LAYERS)
    shape = build_plan(segments, len(lengths), table.skip, table.fill).shape
    total = sum(lengths)
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    rows = shape.rows(chosen)
    ends = np.cumsum(lengths)
    start = 0
    for request, length, trailing in zip(rows.requests, rows.lengths, rows.trailing, strict=True):
        run = rows.tokens[start : start + length]
        assert (np.diff(run) == 1).all()
        assert (shape.requests[run] == request).all()
        assert run[-1] + 1 + trailing == ends[request]
        following = rows.tokens[start + length : start + length + 1]
        assert all(f > run[-1] + 1 or shape.requests[f] != request for f in following)
        start += length
    assert start == len(rows.tokens) == chosen.sum()
    assert shape.rows(chosen.copy()) is rows


def test_sub_layers_with_equal_rows_share_one_object() -> None:
    table = MaskTable(LAYERS)
    _, mask = phase_masks(SkipSet.of(blocks=(1, 2)), LAYERS)
    segments = [Segment(0, DECODE, 0, 1), Segment(1, DECODE, table.acquire(mask), 1)]
    plan = build_plan(segments, 2, table.skip, table.fill)
    assert plan.layers[1].attention is plan.layers[2].mlp
    assert plan.layers[0].attention is plan.layers[3].mlp


def test_prompts_fill_what_generated_tokens_will_attend() -> None:
    for phase, elastic, filled in (
        (Phase.BOTH, False, False),
        (Phase.PREFILL, False, True),
        (Phase.DECODE, False, False),
        (Phase.BOTH, True, True),
    ):
        prefill, decode = phase_masks(
            SkipSet.of(attention=(1,), phase=phase, elastic=elastic), LAYERS
        )
        assert prefill.fill.tolist() == [False, filled, False, False]
        assert not decode.fill.any()


def test_leaving_fills_what_was_not_skipped_for_good() -> None:
    _, static = phase_masks(SkipSet.of(attention=(3,), mlp=(0,)), LAYERS)
    left = static.leaving_after(1, fill=True)
    assert left.skip.tolist() == [[False, True], [False, False], [True, True], [True, True]]
    assert left.fill.tolist() == [False, False, True, False]
    assert not static.leaving_after(1, fill=False).fill.any()
