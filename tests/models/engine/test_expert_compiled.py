"""With compilation on, steps without expert controls run vLLM's compiled model, others the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.engine import Engine, engine
from support.expert_policies import CONTRAST, CUT, DECODE, LAST, MASK, TOP_1, prompt_of
from support.tiny import make_model

POLICIES = [MASK, TOP_1, CUT, DECODE, LAST, CONTRAST]
TOKENS = 8


def counted(running: Engine) -> np.ndarray:
    return running.counts().selections


Answers = tuple[list[list[list[int]]], list[np.ndarray]]
"""Tokens and counts of batches: stock, all under control, and both side by side."""


def answers(running: Engine) -> Answers:
    prompts = [prompt_of(4 + 7 * index, seed=index) for index in range(len(POLICIES))]
    tokens, counts = [], []
    for policies in ([None] * len(POLICIES), POLICIES, [None, *POLICIES[1:-1], None]):
        before = counted(running)
        tokens.append(running.generate(prompts, policies, TOKENS))
        counts.append(counted(running) - before)
    return tokens, counts


@pytest.fixture(scope="module")
def both(models_folder: Path) -> tuple[Answers, Answers]:
    """What an eager engine gives, and a compiled one."""
    folder = make_model("qwen3_moe", models_folder / "experts-compiled")
    with engine(folder) as eager:
        expected = answers(eager)
    with pytest.MonkeyPatch.context() as patch, engine(folder, enforce_eager=False) as compiled:
        decoder = compiled.runner.get_model().model
        assert not decoder.do_not_compile
        calls: list[int] = []
        stock = type(decoder).__call__

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return stock(self, *args, **kwargs)

        patch.setattr(type(decoder), "__call__", watched)
        found = answers(compiled)
        # At least all steps of the first batch.
        assert len(calls) >= TOKENS
    return expected, found


def test_tokens_are_those_of_an_eager_engine(both: tuple[Answers, Answers]) -> None:
    (expected, _), (found, _) = both
    assert expected[0] != expected[1]
    assert found == expected
