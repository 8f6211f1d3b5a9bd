"""What a profile says of layers: importance, other measures, exits, skip sets that were found."""

from __future__ import annotations

from sluice.models.policy.policy import Phase
from sluice.models.profile.values import Interval, Layers, PerLayer, Share, Strict


class ImportanceFields(Strict):
    """`1 - cos` of the input and output of each layer's block, attention and MLP (LLM-Drop)."""

    block: PerLayer
    attention: PerLayer
    mlp: PerLayer


class UnitEvidence(Strict):
    """How sure the importance of a kind of unit is.

    Attributes:
        intervals: low and high of each layer's importance, 95 %.
        order: layers from the least important on.
        p_values: per layer of `order` but the first, of its importance being above that of the
            layer before it, adjusted for all such pairs.
    """

    intervals: tuple[tuple[float, float], ...]
    order: Layers
    p_values: tuple[Share, ...]


class ImportanceEvidence(Strict):
    """How sure `ImportanceFields` are; units are None where the prompts are too few to say.

    Attributes:
        prompts: different ones that importance was measured on.
        notes: what they do not show, in words.
    """

    prompts: int
    block: UnitEvidence | None = None
    attention: UnitEvidence | None = None
    mlp: UnitEvidence | None = None
    notes: tuple[str, ...] = ()


class LayerMetrics(Strict):
    """Other measures of what each layer does; see
    `sluice.models.offline.calibrate.depth.importance`.

    Attributes:
        contribution: `|h_l - h_{l-1}| / |h_{l-1}|` of blocks, and of the two sub-layers.
        turn: `cos(h_l - h_{l-1}, h_{l-1})` of blocks.
        future_effect: largest relative change of a later position's later layer, layer left out.
        lim: `-cos(h_{l-1}, h_l)`: layer input modification.
        zd: share of the layer's weights with a z-score above 1.
    """

    contribution: ImportanceFields
    turn: PerLayer
    future_effect: PerLayer
    lim: PerLayer
    zd: PerLayer


class ExitThreshold(Strict):
    """The lowest threshold of an exit method whose risk is bounded (CALM, Learn-then-Test).

    Attributes:
        method: exit method.
        layers: after which tokens were tested.
        threshold: that was chosen.
        tolerance: delta: share of tokens that may differ from full depth's.
        error: epsilon: probability that the bound does not hold.
        agreement: share of tokens equal to full depth's on the calibration set.
        mean_layers: that a generated token ran there.
    """

    method: str
    layers: Layers
    threshold: float
    tolerance: Share
    error: Share
    agreement: Share
    mean_layers: float


class FoundSkipSet(Strict):
    """A skip set found by search.

    Attributes:
        attention: layers whose attention is left out of generated tokens.
        mlp: layers whose MLP is left out of generated tokens.
        quality: exact match or agreement where it was found.
        seconds: measured time of its trial, over full depth's.
    """

    attention: Layers
    mlp: Layers
    quality: Share
    seconds: float


class AdapterFields(Strict):
    """An adapter that was trained for a skip set (`sluice.models.depth.stream_adapter`).

    Attributes:
        attention: layers whose attention is left out.
        mlp: layers whose MLP is left out.
        phase: of the tokens that leave them out, and on which the adapter acts.
        layers: after which it acts.
        rank: of each of its maps.
        prompts: that it was trained on.
        held_out: prompts that it was measured on.
        before: agreement with full depth's tokens on those, without it.
        after: the same with it.
        divergence_before: Kullback-Leibler divergence from full depth, mean over tokens, nats.
        divergence_after: the same with it.
    """

    attention: Layers
    mlp: Layers
    phase: Phase
    layers: Layers
    rank: int
    prompts: int
    held_out: int
    before: Interval
    after: Interval
    divergence_before: float
    divergence_after: float
