"""Tokens of choices, the likeliest of them, and the controls that choices cannot show."""

from __future__ import annotations

from typing import Any

import pytest

from sluice.models.offline.evaluate.choices import choice_tokens, idle_controls, likeliest


@pytest.mark.parametrize(
    ("joined", "expected"),
    [
        ([1, 2, 3, 9], [3, 9]),  # Written as one: the word in the middle of a text.
        ([1, 7, 9], [5]),  # A token spans both.
        ([1, 2], [5]),  # The choice is swallowed.
    ],
)
def test_tokens_of_a_choice(joined: list[int], expected: list[int]) -> None:
    assert choice_tokens([1, 2], joined, [5]) == expected


def test_the_likeliest() -> None:
    short, long, other = [-1.0], [-0.6, -0.6], [-2.0]
    assert likeliest([other, long, short], per_token=False) == 2
    assert likeliest([other, short, long], per_token=True) == 2
    assert likeliest([other, short, short], per_token=False) == 1, "the first of equals"


SKIP = {"attention": [1], "mlp": []}
EXIT = {"method": "confidence", "layers": [1], "threshold": 0.5, "kv": "propagate"}
REMIX = {"method": "mode", "scope": "last", "alpha": 0.5, "layers": [1], "top": 2}


@pytest.mark.parametrize(
    ("policy", "idle"),
    [
        ({}, ()),
        ({"depth": {"skip": SKIP, "phase": "both"}}, ()),
        ({"depth": {"skip": SKIP, "phase": "prefill"}}, ()),
        ({"depth": {"skip": SKIP, "phase": "decode", "elastic": True}}, ("depth.skip",)),
        ({"depth": {"exit": EXIT}}, ("depth.exit",)),
        ({"depth": {"skip": SKIP, "phase": "both", "exit": EXIT}}, ("depth.exit",)),
        ({"depth": {"adaptive": {"method": "mod"}}}, ()),
        ({"depth": {"adaptive": {"method": "lac", "mode": "readout", "threshold": 0.5}}}, ()),
        ({"depth": {"adaptive": {"method": "lac", "mode": "replace", "threshold": 0.5}}}, ()),
        (
            {"depth": {"adaptive": {"method": "lac", "mode": "predict", "threshold": 0.5}}},
            ("depth.adaptive",),
        ),
        ({"depth": {"adaptive": {"method": "similarity", "budget": 0.5}}}, ("depth.adaptive",)),
        ({"depth": {"adaptive": {"method": "first", "masked_prefill": True}}}, ()),
        ({"experts": {"top_k": 2}}, ()),
        ({"experts": {"top_k": 2, "budget": {"method": "oea", "k0": 1}}}, ("experts.budget",)),
        ({"experts": {"remix": REMIX}}, ("experts.remix",)),
        (
            {"experts": {"contrast": {"weak_rank": 1, "beta": 0.5, "alpha": 0.1}}},
            ("experts.contrast",),
        ),
    ],
)
def test_controls_of_generated_tokens(policy: dict[str, Any], idle: tuple[str, ...]) -> None:
    assert idle_controls(policy) == idle
