"""What `routing.effort` leaves out: by measured levels where there are some, else by blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.edge import CAPABILITIES, EFFORT, LAYERS, PROFILE, changed, depth, policy, refused
from support.full_profile import frontier, level

from sluice.models.policy.policy import Phase, SkipSet
from sluice.models.routing.capabilities import Capabilities

SubLayer = tuple[str, int]


def measured(levels: Sequence[dict[str, Any]], *, importance: bool = True) -> Capabilities:
    """The small model with these levels."""
    parts = {"frontier": frontier(effort=levels)} | ({} if importance else {"importance": None})
    return replace(CAPABILITIES, profile=changed(PROFILE, **parts))


def left_out(effort: float, capabilities: Capabilities) -> frozenset[SubLayer]:
    skip = policy({"effort": effort}, capabilities).skip
    attention = (("attention", layer) for layer in skip.attention)
    return frozenset((*attention, *(("mlp", layer) for layer in skip.mlp)))


# Attention 5 and MLP 4, then attention 3 and 4 with MLPs 3 and 5, then block 2.
LEVELS = [
    level(0.8, (5,), (4,)),
    level(0.5, (3, 4, 5), (3, 4, 5)),
    level(0.4, (2, 3, 4, 5), (2, 3, 4, 5)),
]
BY_DEPTH = measured(LEVELS, importance=False)
FIRST = {("attention", 5), ("mlp", 4)}
# Without importance the deepest goes first, of a layer the attention.
STEPS: dict[float, set[SubLayer]] = {
    1.0: set(),
    0.96: set(),
    0.95: {("attention", 5)},
    0.86: {("attention", 5)},
    0.84: FIRST,
    0.8: FIRST,
    0.77: FIRST,
    0.76: FIRST | {("mlp", 5)},
    0.65: FIRST | {("mlp", 5), ("attention", 4)},
    0.58: FIRST | {("mlp", 5), ("attention", 4), ("attention", 3)},
    0.53: FIRST | {("mlp", 5), ("attention", 4), ("attention", 3), ("mlp", 3)},
    0.5: {(unit, layer) for unit in ("attention", "mlp") for layer in (3, 4, 5)},
    0.4: {(unit, layer) for unit in ("attention", "mlp") for layer in (2, 3, 4, 5)},
}


@pytest.mark.parametrize("effort", STEPS)
def test_between_two_levels_sub_layers_go_one_by_one(effort: float) -> None:
    assert left_out(effort, BY_DEPTH) == STEPS[effort]


def test_the_order_between_levels_is_that_of_importance() -> None:
    """Of what the second level adds, MLP 3 is less important (0.8) than the attentions (0.9)."""
    assert left_out(0.72, measured(LEVELS)) == FIRST | {("mlp", 5)}
    assert left_out(0.65, measured(LEVELS)) == FIRST | {("mlp", 5), ("mlp", 3)}


def test_the_rest_of_the_policy() -> None:
    expected = SkipSet.of(attention=(5,), mlp=(4,), phase=Phase.DECODE, elastic=True)
    assert policy({"effort": 0.8}, BY_DEPTH).skip == expected
    both = {"effort": 0.8, **depth(phase="both")}
    assert policy(both, BY_DEPTH).skip == replace(expected, phase=Phase.BOTH)
    assert policy({"effort": 1}, BY_DEPTH).stock
    assert policy({"effort": 0.96}, BY_DEPTH).stock


@pytest.mark.parametrize("effort", [0.399999, 0.2, 1e-9])
def test_nothing_is_promised_below_the_lowest_level(effort: float) -> None:
    assert refused({"effort": effort}, BY_DEPTH) == (EFFORT, "invalid_field")
    with pytest.raises(Exception, match=r"is below 0\.4, the lowest effort that was measured"):
        policy({"effort": effort}, BY_DEPTH)


def test_a_level_that_leaves_nothing_to_run() -> None:
    everything = tuple(range(LAYERS))
    bare = measured([level(0.1, everything, everything)])
    assert refused({"effort": 0.1}, bare) == (EFFORT, "nothing_left_to_run")
    assert len(left_out(0.2, bare)) == 11


@pytest.mark.parametrize("effort", [0.7, 0.51, 0.2, 1.0])
def test_a_frontier_without_levels_changes_nothing(effort: float) -> None:
    bare = replace(CAPABILITIES, profile=PROFILE)
    assert left_out(effort, measured([])) == left_out(effort, bare)


@st.composite
def nested_levels(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Levels as a profile may hold them: nested, of falling effort, one sub-layer kept."""
    units = [(unit, layer) for unit in ("attention", "mlp") for layer in range(LAYERS)]
    order = draw(st.permutations(units))[:-1]
    sizes = sorted(draw(st.sets(st.integers(1, len(order)), min_size=1, max_size=5)))
    efforts = draw(
        st.sets(
            st.floats(0, 1, exclude_min=True, exclude_max=True),
            min_size=len(sizes),
            max_size=len(sizes),
        )
    )
    return [
        level(
            effort,
            tuple(sorted(layer for unit, layer in order[:size] if unit == "attention")),
            tuple(sorted(layer for unit, layer in order[:size] if unit == "mlp")),
        )
        for size, effort in zip(sizes, sorted(efforts, reverse=True), strict=True)
    ]


@given(
    nested_levels(),
    st.booleans(),
    st.lists(st.floats(0, 1, exclude_min=True), min_size=2),
    st.data(),
)
def test_every_pair_of_efforts_is_nested(
    levels: list[dict[str, Any]], importance: bool, efforts: list[float], data: st.DataObject
) -> None:
    capabilities = measured(levels, importance=importance)
    own = [each["effort"] for each in levels]
    asked = sorted({*efforts, *own, data.draw(st.sampled_from(own))}, reverse=True)
    before: frozenset[SubLayer] = frozenset()
    for effort in asked:
        if effort < own[-1]:
            assert refused({"effort": effort}, capabilities) == (EFFORT, "invalid_field")
            continue
        found = left_out(effort, capabilities)
        assert before <= found
        # Never less than the level above it, never more than the one below, its own exactly.
        above = [each for each in levels if each["effort"] >= effort]
        below = next(each for each in levels if each["effort"] <= effort)
        assert found >= (sub_layers(above[-1]) if above else frozenset())
        assert found <= sub_layers(below)
        before = found
    for each in levels:
        assert left_out(each["effort"], capabilities) == sub_layers(each)


def sub_layers(held: dict[str, Any]) -> frozenset[SubLayer]:
    return frozenset((unit, layer) for unit in ("attention", "mlp") for layer in held[unit])


@given(nested_levels(), st.floats(0, 1))
def test_the_nearest_set_is_taken(levels: list[dict[str, Any]], place: float) -> None:
    """Against every set between two levels, each standing for an equal part of the way."""
    capabilities = measured(levels)
    ends = [{"effort": 1.0, "attention": (), "mlp": ()}, *levels]
    for upper, lower in zip(ends, levels, strict=False):
        effort = lower["effort"] + place * (upper["effort"] - lower["effort"])
        if not lower["effort"] <= effort <= upper["effort"]:
            continue  # Rounded beyond the end.
        more = len(sub_layers(lower) - sub_layers(upper))
        step = (upper["effort"] - lower["effort"]) / more
        taken = len(left_out(effort, capabilities) - sub_layers(upper))
        distance = abs(upper["effort"] - taken * step - effort)
        assert distance <= step / 2 * (1 + 1e-6) + 1e-12
