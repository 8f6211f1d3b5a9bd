"""Elastic requests (`effort`) of one batch leave out what they all can, and no K/V is missing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.engine import Engine, engine
from support.reference import ATTENTION, Reference
from support.tiny import LAYERS, VOCABULARY, make_model

from sluice.models.depth.skip_order import Unit, drop_order, skip_first
from sluice.models.policy.policy import Phase, RoutingPolicy, SkipSet

PROMPTS = [[(17 * i * i + 3 * i + seed) % VOCABULARY for i in range(20)] for seed in (1, 2)]


ORDER = drop_order(Unit.BLOCK, LAYERS, {Unit.BLOCK: [6, 4, 3, 2, 1, 5]})


def effort(blocks: int, phase: Phase = Phase.DECODE) -> SkipSet:
    return skip_first(ORDER, blocks, phase, elastic=True)


@pytest.fixture(scope="module")
def folder(models_folder: Path) -> Path:
    return make_model("llama", models_folder / "agreement")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Engine]:
    with engine(folder) as started:
        yield started


class Stepwise(Reference):
    """The reference with a static set that changes at a position."""

    def __init__(self, folder: Path, change: int, before: SkipSet) -> None:
        super().__init__(folder)
        self._change, self._before = change, before

    def _static(self, skip: SkipSet, prompt: int, length: int) -> torch.Tensor:
        ran = super()._static(skip, prompt, length)
        early = super()._static(self._before, prompt, length)
        ran[prompt : self._change] = early[prompt : self._change]
        return ran


def test_efforts_are_nested() -> None:
    assert [layer for _, layer in ORDER] == [4, 3, 2, 1, 5, 0]
    nested = [set(effort(count).mlp) for count in range(LAYERS)]
    assert all(small < large for small, large in pairwise(nested))


@pytest.mark.parametrize("phase", [Phase.DECODE, Phase.BOTH])
def test_alone_an_effort_is_its_skip_set(running: Engine, folder: Path, phase: Phase) -> None:
    skip = effort(3, phase)
    expected = Reference(folder).greedy(PROMPTS[0], skip, 12)
    assert running.generate([PROMPTS[0]], [skip], 12)[0] == expected


@pytest.mark.parametrize("phase", [Phase.DECODE, Phase.BOTH])
def test_the_deeper_neighbour_wins_until_it_ends(
    running: Engine, folder: Path, phase: Phase
) -> None:
    """Two blocks left out by one and four by the other: two by both while both are there."""
    shallow, deep = effort(2), effort(4, phase)
    requests, params = running._requests(PROMPTS, [shallow, deep], 12, ["a", "b"], {})
    params[0].max_tokens = 5
    outputs = running.llm.generate(requests, params, use_tqdm=False)
    # Both start in one step; the shallow one's last step is that of its fourth fed-back token.
    together = 4
    expected = Stepwise(folder, len(PROMPTS[1]) + together, effort(2)).greedy(PROMPTS[1], deep, 12)
    assert outputs[1].outputs[0].token_ids == expected
    assert expected != Reference(folder).greedy(PROMPTS[1], deep, 12)
    assert outputs[0].outputs[0].token_ids == Reference(folder).greedy(PROMPTS[0], shallow, 5)
    counts = running.take_record("b").counts[1, :, ATTENTION]
    executed = counts[:, 0].tolist()
    assert executed[0] == executed[5] == 11
    assert executed[1] == executed[2] == together
    assert executed[3] == executed[4] == 0


def test_what_was_left_out_once_stays_out(running: Engine, folder: Path) -> None:
    """A deeper neighbour that comes later changes nothing: those K/V were never written."""
    deep = effort(4)
    alone = Reference(folder).greedy(PROMPTS[1], deep, 12)
    engine_ = running.llm.llm_engine
    requests, params = running._requests(PROMPTS, [effort(2), deep], 12, None, {})
    engine_.add_request("deep", requests[1], params[1])
    answers = {}
    step = 0
    while engine_.has_unfinished_requests():
        if step == 4:
            engine_.add_request("shallow", requests[0], params[0])
        for output in engine_.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
        assert step < 100
    assert answers["deep"] == alone
    assert answers["shallow"] == Reference(folder).greedy(PROMPTS[0], effort(2), 12)


def test_preemption_replays_the_agreement(running: Engine) -> None:
    policies = [RoutingPolicy(effort(2)), RoutingPolicy(effort(4))]
    expected = running.generate_preempted(PROMPTS, policies, 12, ())
    for keep_cache in (False, True):
        replayed = running.generate_preempted(PROMPTS, policies, 12, {5, 9}, keep_cache=keep_cache)
        assert replayed == expected
