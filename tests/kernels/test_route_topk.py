"""Selection under controls: what must hold whatever is asked, and the reference row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routings import Routing, routings

from sluice.kernels.route_topk import (
    RouterSpec,
    RowControls,
    Selection,
    score,
    select,
    select_rank,
    selection_scores,
)

TIE = 2e-6
MANY = settings(max_examples=200, deadline=None)


def dispatched(selection: Selection) -> list[dict[int, float]]:
    """Weights by expert of every row, unused slots checked on the way."""
    rows = []
    # vLLM's kernels of the experts read memory, not strides.
    assert selection.ids.is_contiguous()
    assert selection.weights.is_contiguous()
    parts = (selection.ids, selection.weights, selection.active)
    for ids, weights, active in zip(*(part.tolist() for part in parts), strict=True):
        assert 1 <= active <= len(ids)
        chosen = dict(zip(ids[:active], weights[:active], strict=True))
        assert len(chosen) == active, "an expert runs twice"
        assert set(ids[active:]) <= chosen.keys(), "an unused slot loads another expert"
        assert not any(weights[active:]), "an unused slot has a weight"
        rows.append(chosen)
    return rows


def assert_sound(routing: Routing, selection: Selection) -> None:
    rows, experts = routing.raw.shape
    spec = routing.spec
    assert selection.ids.dtype == torch.int32
    assert selection.weights.dtype == torch.float32
    assert selection.ids.shape == selection.weights.shape
    assert len(selection.ids) == len(selection.active) == len(selection.taken) == rows
    assert selection.ids.shape[1] == int(selection.active.max())
    assert 0 <= int(selection.ids.min()) <= int(selection.ids.max()) < experts
    assert not selection.weights.isnan().any()
    taken = selection.taken.tolist()
    for row, (chosen, usual) in enumerate(zip(dispatched(selection), routing.stock(), strict=True)):
        asked = routing.asked[row]
        protected = {*asked.protected} & usual
        assert not chosen.keys() & {*asked.masked, *asked.dropped}
        assert chosen.keys() >= {*asked.forced, *protected}
        assert len(chosen) <= (asked.top_k or spec.top_k) + len(protected)
        assert taken[row] == len(usual - chosen.keys())
        if routing.shared is not None:
            assert chosen.keys() <= {*routing.shared, *asked.forced, *protected}
        total = sum(chosen.values())
        if spec.renormalize:
            assert total == pytest.approx(spec.scale, rel=1e-5)
        else:
            for expert in chosen.keys() - asked.forced.keys():
                assert chosen[expert] == pytest.approx(
                    float(routing.scores[row, expert]) * spec.scale, rel=1e-6
                )


def assert_as_reference(routing: Routing, selection: Selection) -> None:
    for chosen, expected in zip(dispatched(selection), routing.expected(), strict=True):
        if expected.margin > TIE:
            assert chosen.keys() == expected.weights.keys()
            assert chosen == pytest.approx(expected.weights, abs=1e-5)


@MANY
@given(routings(), st.booleans())
def test_controls(routing: Routing, explicit: bool) -> None:
    selection = routing.selected(explicit=explicit)
    assert_sound(routing, selection)
    assert_as_reference(routing, selection)


@MANY
@given(routings(budget=True), st.booleans())
def test_controls_within_a_shared_set(routing: Routing, explicit: bool) -> None:
    selection = routing.selected(explicit=explicit)
    assert_sound(routing, selection)
    assert_as_reference(routing, selection)


@settings(max_examples=60, deadline=None)
@given(routings(remix=False))
def test_rows_do_not_depend_on_each_other(routing: Routing) -> None:
    together = dispatched(routing.selected())
    for row, (chosen, expected) in enumerate(zip(together, routing.expected(), strict=True)):
        if expected.margin <= TIE:
            continue
        (alone,) = dispatched(routing.row(row).selected())
        assert alone.keys() == chosen.keys()
        assert alone == pytest.approx(chosen, rel=1e-5, abs=1e-30)


@MANY
@given(routings(controls=False, remix=False), st.booleans())
def test_neutral_controls_select_as_the_router_does(routing: Routing, explicit: bool) -> None:
    selection = routing.selected(explicit=explicit)
    assert [set(row) for row in dispatched(selection)] == routing.stock()
    assert selection.active.tolist() == [routing.spec.top_k] * len(routing.raw)
    assert not selection.taken.any()
    assert_as_reference(routing, selection)


@MANY
@given(routings(controls=False, remix=False), st.data())
def test_one_expert_by_rank(routing: Routing, data: st.DataObject) -> None:
    spec, (rows, experts) = routing.spec, routing.raw.shape
    reach = spec.topk_group * (experts // spec.groups)
    ranks = data.draw(st.lists(st.integers(0, reach - 1), min_size=rows, max_size=rows))
    choice = selection_scores(routing.raw, spec)
    selection = select_rank(choice, torch.tensor(ranks), spec)
    assert selection.active.tolist() == [1] * rows
    for row, (rank, usual) in enumerate(zip(ranks, routing.stock(), strict=True)):
        values = choice[row].tolist()
        (expert,) = selection.ids[row].tolist()
        assert sum(value > values[expert] for value in values) <= rank
        assert sum(value >= values[expert] for value in values) > rank
        assert selection.weights[row].tolist() == [spec.scale]
        if values.count(values[expert]) == 1:
            assert int(selection.taken[row]) == len(usual - {expert})


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4])
def test_non_contiguous_logits(scoring: str, dtype: torch.dtype, groups: int) -> None:
    spec = RouterSpec(3, scoring, groups=groups, topk_group=min(groups, 2))
    logits = torch.randn(8, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    controls = RowControls(
        k=torch.tensor([[2]]), most=2, uniform=True, bias=torch.zeros(1, 8).index_fill_(
            1, torch.tensor([1]), -1.0
        ),
    )  # fmt: skip

    def run(own: torch.Tensor) -> Selection:
        scores = score(own, spec)
        return select(
            scores,
            selection_scores(scores, spec, controls),
            selection_scores(scores, spec),
            spec,
            controls,
        )

    strided, plain = run(logits.t()), run(logits.t().contiguous())
    assert not logits.t().is_contiguous()
    assert score(logits.t(), spec).dtype == torch.float32
    for name in ("ids", "weights", "active", "taken"):
        assert torch.equal(getattr(strided, name), getattr(plain, name))


def test_a_row_beside_one_with_a_share_keeps_experts_of_vanishing_score() -> None:
    """Rounding of the share's running sum must not cut a row that has none."""
    raw = torch.full((2, 8), 1e-9)
    raw[:, :4] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    spec = RouterSpec(8, renormalize=False)
    top_p = torch.tensor([[torch.inf], [0.5]])
    controls = RowControls(k=torch.tensor([[8], [8]]), most=8, top_p=top_p)
    selection = select(raw, raw, raw, spec, controls)
    assert selection.active.tolist() == [8, 2]


@pytest.mark.parametrize("experts", [8, 64, 128])
def test_ties_fall_alike_alone_and_beside_wider_rows(experts: int) -> None:
    """bf16 logits tie often; how many experts a neighbour wants must not decide between them."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(64, experts, generator=generator).bfloat16()
    spec = RouterSpec(4)
    scores = score(logits, spec)
    alone = RowControls(k=torch.tensor([[2]]), most=2, uniform=True)
    k = torch.full((64, 1), 2)
    k[0] = 8
    beside = RowControls(k=k, most=8)
    one = dispatched(select(scores[1:], scores[1:], scores[1:], spec, alone))
    other = dispatched(select(scores, scores, scores, spec, beside))[1:]
    assert [row.keys() for row in one] == [row.keys() for row in other]


def test_experts_without_any_score_share_alike() -> None:
    """A re-mix may leave no score to any expert that the mask leaves."""
    raw = torch.tensor([[0.5, 0.3, 0.2]])
    remixed = torch.tensor([[1.0, 0.0, 0.0]])
    controls = RowControls(
        k=torch.tensor([[2]]), most=2, uniform=True, bias=torch.tensor([[float("-inf"), 0.0, 0.0]])
    )
    spec = RouterSpec(2)
    choice = selection_scores(remixed, spec, controls)
    selection = select(remixed, choice, selection_scores(raw, spec), spec, controls)
    assert dispatched(selection) == [{1: 0.5, 2: 0.5}]
