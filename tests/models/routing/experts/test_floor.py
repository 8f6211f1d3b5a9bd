"""A mask that is let through leaves every token its experts, whatever the router's scores.

Group-limited selection is written down here a second time, as the routers define it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.edge import named

from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import ExpertPolicy
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.experts.floor import check_floor
from sluice.models.routing.schema import NamedExperts

OUT = -math.inf


@dataclass(frozen=True)
class Case:
    """A layer of a router, the experts taken out and forced in it, and how many a token wants."""

    shape: ExpertShape
    masked: tuple[int, ...]
    forced: tuple[int, ...]
    wanted: int

    @property
    def size(self) -> int:
        return self.shape.experts // self.shape.groups

    def problem(self) -> RoutingError | None:
        policy = ExpertPolicy(
            masked=tuple((0, e) for e in self.masked),
            forced=tuple((0, e, None) for e in self.forced),
        )
        deactivate, activate = (
            [NamedExperts.model_validate(entry) for entry in named(0, *ids)]
            for ids in (self.masked, self.forced)
        )
        try:
            check_floor(policy, {0: self.wanted}, self.shape, deactivate, activate)
        except RoutingError as error:
            return error
        return None

    def found(self, scores: list[float]) -> int:
        """Experts that are in reach of a token with these scores."""
        choice = [OUT if e in self.masked else score for e, score in enumerate(scores)]
        groups = []
        for group in range(self.shape.groups):
            own = range(group * self.size, (group + 1) * self.size)
            best = sorted((choice[e] for e in own), reverse=True)
            score = sum(best[:2]) if self.shape.corrected else best[0]
            groups.append(math.inf if {*own} & {*self.forced} else score)
        ranked = sorted(range(self.shape.groups), key=lambda g: -groups[g])
        # Which of several groups without a score comes first is chance: none of them counts.
        kept = [g for g in ranked[: self.shape.topk_group] if groups[g] > OUT]
        return sum(choice[e] > OUT for g in kept for e in range(g * self.size, (g + 1) * self.size))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups, size = draw(st.integers(2, 5)), draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, groups))
    everyone = range(groups * size)
    masked = draw(st.sets(st.sampled_from(everyone), min_size=1, max_size=len(everyone) - 1))
    forced = draw(st.sets(st.sampled_from(sorted({*everyone} - masked)), max_size=3))
    wanted = draw(st.integers(1, topk_group * size))
    shape = ExpertShape(
        layers=(0,),
        experts=len(everyone),
        top_k=wanted,
        groups=groups,
        topk_group=topk_group,
        corrected=draw(st.booleans()),
    )
    return Case(shape, tuple(sorted(masked)), tuple(sorted(forced)), wanted)


@settings(max_examples=400, deadline=None)
@given(cases(), st.data())
def test_an_admitted_mask_never_leaves_too_few(case: Case, data: st.DataObject) -> None:
    assume(case.problem() is None)
    for _ in range(8):
        liked = data.draw(st.permutations(range(case.shape.groups)))
        noise = data.draw(st.lists(st.floats(-1, 1), min_size=case.size, max_size=case.size))
        scores = [float(3 * rank) + more for rank in liked for more in noise]
        assert case.found(scores) >= case.wanted


@settings(max_examples=400, deadline=None)
@given(cases())
def test_a_refused_mask_leaves_too_few_to_some_token(case: Case) -> None:
    error = case.problem()
    assume(error is not None and error.reason == "too_few_experts")
    live = [
        sum(g * case.size <= e < (g + 1) * case.size for e in range(case.shape.experts))
        - sum(g * case.size <= e < (g + 1) * case.size for e in case.masked)
        for g in range(case.shape.groups)
    ]
    least = 2 if case.shape.corrected else 1
    own = {e // case.size for e in case.forced}
    usable = own | {g for g, count in enumerate(live) if count >= least}
    # The token that likes the emptiest groups best.
    scores = [1.0 - live[e // case.size] / 10 for e in range(case.shape.experts)]
    assert case.found(scores) < case.wanted or len(usable) < case.shape.topk_group


@given(st.sets(st.integers(0, 7), min_size=1), st.integers(1, 8))
def test_without_groups_the_live_experts_count(masked: set[int], wanted: int) -> None:
    shape = ExpertShape(layers=(0,), experts=8, top_k=wanted)
    refused = Case(shape, tuple(sorted(masked)), (), wanted).problem() is not None
    assert refused == (8 - len(masked) < wanted)
