"""What a profile says of experts: re-mix references, behaviours, the map, experts per layer."""

from __future__ import annotations

from typing import Literal

from sluice.models.profile.values import Layers, PerLayer, Share, Strict

OWN_ENCODER = "model"
"""Encoder of the reference sets whose prompt embeddings are the model's own."""


class ReferenceSet(Strict):
    """A named set of re-mix references (C3PO).

    Attributes:
        layers: decoder layers whose router probabilities it holds, ascending.
        width: of its prompt embeddings.
        encoder: `model` if they are the model's own (`sluice.models.experts.remix`), or the name
            of the encoder that the client has to use.
    """

    layers: Layers
    width: int
    encoder: str = "model"


class BehaviourFields(Strict):
    """Experts behind a behaviour: MoTE's fTRI.

    Attributes:
        experts: (layer, expert), most distinctive first.
        scores: mean activation of prompts with the behaviour less that of the others, as `experts`.
        measure: what an activation is, `weight` or `count`.
        prompts: with the behaviour, and without.
        intervals: low and high of each score, 95 %; None in profiles made before they were kept.
        p_values: of each score being above 0, adjusted for all experts of the model; or None.
        note: what the prompts do not show, in words.
    """

    experts: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]
    measure: Literal["weight", "count"]
    prompts: tuple[int, int]
    intervals: tuple[tuple[float, float], ...] | None = None
    p_values: tuple[Share, ...] | None = None
    note: str | None = None


class ExpertMap(Strict):
    """What each routed expert did on the calibration text.

    Attributes:
        layers: decoder layers with routed experts, ascending.
        load: per entry of `layers`, share of the tokens that each expert served.
        maxima: per entry of `layers`, largest absolute output of each expert before its weight.
    """

    layers: Layers
    load: tuple[PerLayer, ...]
    maxima: tuple[PerLayer, ...]


class ExpertBudgetLevel(Strict):
    """Experts per token of each layer under a budget (LExI).

    Attributes:
        budget: sum of `top_k` over layers with routed experts.
        top_k: per decoder layer, as `routing.experts.top_k` takes it.
        divergence: sum of the layers' output changes.
        interval: low and high of the divergence, 95 %; None if there was one draw of noise, or in
            profiles made before it was kept.
        p_value: of the divergence being under that of as many experts spread evenly, adjusted for
            all budgets; None where the list is that one, or there is no interval.
        note: what the noise does not show, in words.
    """

    budget: int
    top_k: tuple[int, ...]
    divergence: float
    interval: tuple[float, float] | None = None
    p_value: Share | None = None
    note: str | None = None
