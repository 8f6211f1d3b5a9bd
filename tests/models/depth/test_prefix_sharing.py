"""What other requests may share of a request's K/V: digests, salts, private blocks."""

from __future__ import annotations

import pytest

from sluice.models.depth.prefix_sharing import (
    cache_salt,
    private_generated,
    private_last_prompt,
    prompt_kv_digest,
    reads_whole_prompt,
)
from sluice.models.policy.experts import (
    BudgetMethod,
    Contrast,
    ExpertBudget,
    ExpertPolicy,
    Remix,
    RemixMethod,
    RemixScope,
)
from sluice.models.policy.extra_args import RoutingExtraArgs
from sluice.models.policy.policy import (
    AdaptiveRule,
    ExitRule,
    MissingKV,
    Phase,
    RoutingPolicy,
    SkipSet,
)


def exits(kv: MissingKV) -> RoutingPolicy:
    return RoutingPolicy(exit=ExitRule("confidence", (1, 2), threshold=0.5, kv=kv))


def adapts(method: str, **fields: object) -> RoutingPolicy:
    return RoutingPolicy(adaptive=AdaptiveRule(method, **fields))


def chooses(**controls: object) -> RoutingPolicy:
    return RoutingPolicy(experts=ExpertPolicy(**controls))


SUPPLIED = Remix(RemixMethod.SUPPLIED, RemixScope.LAST, 0.5, (0,), 4, pathway=((1.0, 0.0),))


@pytest.mark.parametrize(
    ("policy", "prompt", "generated"),
    [
        (RoutingPolicy(), False, False),
        (RoutingPolicy(SkipSet.of(mlp=(1,))), True, False),
        (RoutingPolicy(SkipSet.of(mlp=(1,), phase=Phase.PREFILL)), True, True),
        (RoutingPolicy(SkipSet.of(mlp=(1,), phase=Phase.DECODE)), False, True),
        (RoutingPolicy(SkipSet.of(mlp=(1,), elastic=True)), True, True),
        (exits(MissingKV.PROPAGATE), False, True),
        (exits(MissingKV.RECOMPUTE), False, False),
        (adapts("first", threshold=0.5), False, True),
        (adapts("first", threshold=0.5, masked_prefill=True), True, True),
        (adapts("similarity", budget=0.5), False, True),
        (adapts("lac", mode="predict", threshold=0.8), False, True),
        (adapts("lac", mode="readout", threshold=0.8), False, False),
        (adapts("lac", mode="replace", threshold=0.8), True, False),
        (adapts("mod"), True, True),
        (chooses(masked=((0, 1),)), True, False),
        (chooses(dropped=((0, 1),)), True, False),
        (chooses(forced=((0, 1, None),)), True, False),
        (chooses(bias=((0, 1, 0.5),)), True, False),
        (chooses(top_k=1), True, False),
        (chooses(top_p=0.5), True, False),
        (chooses(skip_ratio=0.5), True, False),
        (chooses(budget=ExpertBudget(BudgetMethod.OEA, k0=1)), False, True),
        (chooses(remix=SUPPLIED), False, True),
        (chooses(top_k=1, remix=SUPPLIED), True, True),
        (chooses(contrast=Contrast(1, 0.5, 0.1)), False, False),
    ],
)
def test_what_changes_keys_and_values(policy: RoutingPolicy, prompt: bool, generated: bool) -> None:
    assert (prompt_kv_digest(policy) is not None) == prompt
    assert private_generated(policy) == generated
    extra = RoutingExtraArgs(policy, "key")
    assert RoutingExtraArgs.decode(extra.encode()) == extra
    assert (cache_salt(extra, None) is not None) == prompt


def test_a_remix_keeps_the_last_prompt_token_to_itself() -> None:
    assert private_last_prompt(chooses(remix=SUPPLIED))
    for policy in (chooses(top_k=1), chooses(contrast=Contrast(1, 0.5, 0.1)), adapts("mod")):
        assert not private_last_prompt(policy)


def test_a_contrast_reads_its_whole_prompt() -> None:
    assert reads_whole_prompt(chooses(contrast=Contrast(1, 0.5, 0.1)))
    assert not reads_whole_prompt(chooses(remix=SUPPLIED))


def test_prompts_that_no_other_request_may_share() -> None:
    """Their K/V depend on later prompt tokens: only samples of one request have equal salts."""

    def salt(policy: RoutingPolicy, key: str) -> str | None:
        return cache_salt(RoutingExtraArgs(policy, key), None)

    mod, skip = adapts("mod"), RoutingPolicy(SkipSet.of(mlp=(1,)))
    assert salt(mod, "a") == salt(mod, "a")
    assert salt(mod, "a") != salt(mod, "b")
    assert salt(skip, "a") == salt(skip, "b")


def test_salts_differ_by_policy_and_by_client() -> None:
    policies = [RoutingPolicy(), RoutingPolicy(SkipSet.of(mlp=(1,))), adapts("mod")]
    extras = [RoutingExtraArgs(policy, "key") for policy in policies]
    salts = {cache_salt(extra, client) for extra in extras for client in (None, "x", "y")}
    assert len(salts) == 9
    assert cache_salt(extras[0], "x") == "x"
    assert all(salt is None or len(salt) <= 128 for salt in salts)


@pytest.mark.parametrize(
    ("policy", "whole"),
    [
        (adapts("first", threshold=0.5), True),
        (adapts("similarity", budget=0.5), True),
        (adapts("lac", mode="predict", threshold=0.8), False),
        (adapts("lac", mode="readout", threshold=0.8), False),
        (adapts("mod"), False),
        (exits(MissingKV.PROPAGATE), False),
    ],
)
def test_pooled_masks_read_the_whole_prompt(policy: RoutingPolicy, whole: bool) -> None:
    assert reads_whole_prompt(policy) == whole
