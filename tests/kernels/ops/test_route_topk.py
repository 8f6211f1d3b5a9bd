"""Selection under controls: what must hold whatever is asked, and the reference row by row."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.references.routes import TIE, Asked, choice_scores
from support.routings import Pull, Routing, Selected, dispatched, routings

from sluice.kernels.dispatch import AUTO, REFERENCE, TRITON
from sluice.kernels.ops.routing_args import RouterSpec

MANY = settings(max_examples=200, deadline=None)
FEW = settings(max_examples=40, deadline=None)
"""Triton's interpreter is slow."""
quick = pytest.mark.parametrize("choice", [AUTO, REFERENCE])
implementations = pytest.mark.parametrize("choice", [AUTO, REFERENCE, TRITON])


def assert_sound(routing: Routing, selected: Selected) -> None:
    spec, scores = routing.spec, routing.scores
    rows = dispatched(selected)
    assert len(rows) == len(routing.logits)
    for row, (chosen, usual) in enumerate(zip(rows, routing.stock(), strict=True)):
        if row in routing.left:
            # The router's own, whatever that is.
            assert selected.weights[row, : spec.top_k].tolist() == [row + 1.0] * spec.top_k
            assert selected.ids[row, : spec.top_k].tolist() == sorted(usual, reverse=True)
            assert selected.taken[row] == 0
            continue
        asked = routing.asked[row]
        protected = {*asked.protected} & usual
        assert not chosen.keys() & {*asked.masked, *asked.dropped}
        assert chosen.keys() >= {*asked.forced, *protected}
        assert len(chosen) <= (asked.top_k or spec.top_k) + len(protected)
        assert selected.taken[row] == len(usual - chosen.keys())
        if routing.shared is not None:
            assert chosen.keys() <= {*routing.shared, *asked.forced, *protected}
        total = sum(chosen.values())
        if spec.renormalize:
            assert total == pytest.approx(spec.scale, rel=1e-5)
        else:
            for expert in chosen.keys() - asked.forced.keys():
                expected = scores[row][expert] * spec.scale
                assert chosen[expert] == pytest.approx(expected, rel=1e-5, abs=1e-30)


def assert_as_reference(routing: Routing, selected: Selected) -> None:
    rows = zip(dispatched(selected), routing.expected(), strict=True)
    for row, (chosen, expected) in enumerate(rows):
        if expected.margin > TIE and row not in routing.left:
            assert chosen.keys() == expected.weights.keys()
            assert chosen == pytest.approx(expected.weights, abs=1e-5)


@quick
@MANY
@given(routing=routings())
def test_controls(choice: str, routing: Routing) -> None:
    selected = routing.selected(choice)
    assert_sound(routing, selected)
    assert_as_reference(routing, selected)


@quick
@MANY
@given(routing=routings(budget=True))
def test_controls_within_a_shared_set(choice: str, routing: Routing) -> None:
    selected = routing.selected(choice)
    assert_sound(routing, selected)
    assert_as_reference(routing, selected)


@quick
@settings(max_examples=60, deadline=None)
@given(routing=routings())
def test_rows_do_not_depend_on_each_other(choice: str, routing: Routing) -> None:
    together = dispatched(routing.selected(choice))
    for row, (chosen, expected) in enumerate(zip(together, routing.expected(), strict=True)):
        if expected.margin <= TIE or row in routing.left:
            continue
        (alone,) = dispatched(routing.row(row).selected(choice))
        assert alone.keys() == chosen.keys()
        assert alone == pytest.approx(chosen, rel=1e-5, abs=1e-30)


@quick
@settings(max_examples=60, deadline=None)
@given(routing=routings(), more=st.integers(1, 5), repeat=st.booleans())
def test_slots_that_nobody_uses(choice: str, routing: Routing, more: int, repeat: bool) -> None:
    wide = routing.selected(choice, more=more, repeat=repeat)
    narrow = routing.selected(choice)
    if repeat or choice == REFERENCE:
        rows = zip(dispatched(wide, repeat=repeat), dispatched(narrow), strict=True)
        for filled, chosen in rows:
            # A sum over more slots may round in another order.
            assert filled.keys() == chosen.keys()
            assert filled == pytest.approx(chosen, rel=1e-5, abs=1e-30)
    if choice == AUTO:
        # On a CPU nobody waits to know how wide the widest row is.
        assert wide.ids.shape[1] == max(wide.active)


@quick
@MANY
@given(routing=routings(controls=False, remix=False))
def test_neutral_controls_select_as_the_router_does(choice: str, routing: Routing) -> None:
    selected = routing.selected(choice)
    assert_sound(routing, selected)
    assert_as_reference(routing, selected)
    assert selected.active == [routing.spec.top_k] * len(routing.logits)
    assert not any(selected.taken)


@quick
@MANY
@given(routing=routings(controls=False, remix=False), data=st.data())
def test_one_expert_by_rank(choice: str, routing: Routing, data: st.DataObject) -> None:
    spec, (rows, experts) = routing.spec, routing.logits.shape
    reach = spec.topk_group * (experts // spec.groups)
    ranks = data.draw(st.lists(st.integers(0, reach - 1), min_size=rows, max_size=rows))
    weak = Routing(spec, routing.logits, routing.asked, ranks=tuple(ranks))
    selected = weak.selected(choice)
    assert selected.active == [1] * rows
    for row, (chosen, usual) in enumerate(zip(dispatched(selected), weak.stock(), strict=True)):
        values = choice_scores(weak.raw[row].tolist(), weak.router, Asked())
        ((expert, weight),) = chosen.items()
        assert sum(value > values[expert] for value in values) <= ranks[row]
        assert sum(value >= values[expert] for value in values) > ranks[row]
        assert weight == spec.scale
        if values.count(values[expert]) == 1:
            assert selected.taken[row] == len(usual - {expert})


@FEW
@given(routing=routings() | routings(budget=True))
def test_triton_controls(routing: Routing) -> None:
    selected = routing.selected(TRITON)
    assert_sound(routing, selected)
    assert_as_reference(routing, selected)


@FEW
@given(routing=routings(), more=st.integers(1, 5), repeat=st.booleans())
def test_triton_slots_that_nobody_uses(routing: Routing, more: int, repeat: bool) -> None:
    wide = routing.selected(TRITON, more=more, repeat=repeat)
    assert wide.ids.shape[1] > max(wide.active)
    narrow = dispatched(routing.selected(TRITON))
    # Weights are normed by a sum over the slots, which may be taken in another order.
    assert dispatched(wide, repeat=repeat) == [pytest.approx(row, rel=1e-5) for row in narrow]


@FEW
@given(routing=routings(controls=False, remix=False), data=st.data())
def test_triton_one_expert_by_rank(routing: Routing, data: st.DataObject) -> None:
    reach = routing.spec.topk_group * (routing.logits.shape[1] // routing.spec.groups)
    rows = len(routing.logits)
    drawn = st.lists(st.none() | st.integers(0, reach - 1), min_size=rows, max_size=rows)
    weak = replace(routing, ranks=tuple(data.draw(drawn)))
    assert_as_reference(weak, weak.selected(TRITON))


@implementations
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4])
def test_non_contiguous_logits(choice: str, scoring: str, dtype: torch.dtype, groups: int) -> None:
    spec = RouterSpec(3, scoring, groups=groups, topk_group=min(groups, 2))
    logits = torch.randn(8, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    asked = (Asked(bias={1: -1.0}, top_k=2),) * 7
    assert not logits.t().is_contiguous()
    strided = Routing(spec, logits.t(), asked).selected(choice)
    plain = Routing(spec, logits.t().contiguous(), asked).selected(choice)
    assert torch.equal(strided.ids, plain.ids)
    assert torch.equal(strided.weights, plain.weights)


@implementations
def test_logits_of_minus_infinity(choice: str) -> None:
    """All experts but one ruled out by the model itself: their scores are 0, not NaN."""
    logits = torch.full((3, 5), -math.inf)
    logits[:, 3] = 0.5
    routing = Routing(RouterSpec(1), logits, (Asked(top_k=1),) * 3)
    assert dispatched(routing.selected(choice)) == [{3: 1.0}] * 3


@implementations
def test_all_experts_masked_but_one(choice: str) -> None:
    logits = torch.randn(4, 13, generator=torch.Generator().manual_seed(3))
    asked = Asked(masked=frozenset(range(13)) - {6}, top_k=1)
    routing = Routing(RouterSpec(4), logits, (asked,) * 4)
    assert dispatched(routing.selected(choice)) == [{6: 1.0}] * 4


@implementations
def test_a_row_beside_one_with_a_share_keeps_experts_of_vanishing_score(choice: str) -> None:
    """Rounding of the share's running sum must not cut a row that has none."""
    raw = torch.full((2, 8), 1e-9)
    raw[:, :4] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    routing = Routing(
        RouterSpec(8, renormalize=False), raw.log(), (Asked(top_k=8), Asked(top_k=8, top_p=0.5))
    )
    assert routing.selected(choice).active == [8, 2]


@implementations
@pytest.mark.parametrize("experts", [8, 64, 128])
def test_ties_fall_alike_alone_and_beside_wider_rows(choice: str, experts: int) -> None:
    """bf16 logits tie often; how many experts a neighbour wants must not decide between them."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(64, experts, generator=generator).bfloat16()
    narrow, wide = Asked(top_k=2), Asked(top_k=8)
    alone = Routing(RouterSpec(4), logits[1:], (narrow,) * 63)
    beside = Routing(RouterSpec(4), logits, (wide, *[narrow] * 63))
    one = dispatched(alone.selected(choice))
    other = dispatched(beside.selected(choice))[1:]
    assert [row.keys() for row in one] == [row.keys() for row in other]
    # Of equals the first, as the reference has it.
    wanted = [expected.weights.keys() for expected in alone.expected()]
    assert [row.keys() for row in one] == wanted


@implementations
def test_experts_without_any_score_share_alike(choice: str) -> None:
    """A re-mix may leave no score to any expert that the mask leaves."""
    pull = Pull((1.0, 0.0, 0.0), 0.0, 3)
    asked = Asked(masked=frozenset({0}), top_k=2)
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    routing = Routing(RouterSpec(2), logits, (asked,), (pull,))
    assert dispatched(routing.selected(choice)) == [{1: 0.5, 2: 0.5}]
