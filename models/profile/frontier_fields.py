"""What a profile says of settings that were measured: quality, speed, presets, effort."""

from __future__ import annotations

from typing import Any, Literal

from sluice.models.profile.values import Interval, Layers, Share, Strict

EngineMode = Literal["compiled", "eager"]
"""How an engine runs a model: compiled or captured in graphs, or neither."""


class TokenMeasures(Strict):
    """What a setting makes of full depth's own greedy answers, at full depth's own prefix.

    Each token is judged after full depth's tokens before it, whatever the setting said of those.

    Attributes:
        agreement: share of full depth's tokens that are the likeliest under the setting too; its
            interval is over prompts.
        divergence: Kullback-Leibler divergence from full depth's distribution, mean over tokens,
            nats; of full depth's likeliest tokens and one rest, which is at most that of all.
        perplexity: of full depth's tokens.
    """

    agreement: Interval
    divergence: float
    perplexity: float


class FrontierPoint(Strict):
    """One setting as measured.

    Attributes:
        name: of the setting.
        routing: the wire object that asks for it.
        quality: see `Frontier.measure`.
        speed: generated tokens per second over full depth's, same engine and run.
        compute_fraction: share of full depth's compute on all tokens.
        generated_fraction: the same on generated tokens.
        on_frontier: no other point is at least as good in quality, speed and compute, and better in
            one, as measured.
        faster: p-value of its being faster than full depth, adjusted for all points; None of full
            depth itself, and in profiles made before it was kept.
        tokens: what it makes of full depth's own tokens; None in profiles made before that was
            measured.
        normalised: as `quality`, with the log likelihoods of choices per character (lm-eval's
            `acc_norm`); None without choices.
    """

    name: str
    routing: dict[str, Any]
    quality: Interval
    speed: Interval
    compute_fraction: float
    generated_fraction: float
    on_frontier: bool
    faster: Share | None = None
    tokens: TokenMeasures | None = None
    normalised: Interval | None = None


class EffortLevel(Strict):
    """A level of `effort`; each leaves out what the level before it does, and more.

    Attributes:
        effort: share of full depth's compute on generated tokens that it stands for.
        attention: layers whose attention is left out.
        mlp: layers whose MLP is left out.
        quality: as measured.
    """

    effort: Share
    attention: Layers
    mlp: Layers
    quality: Interval


class EqualCompute(Strict):
    """Quality with some units left out of generated tokens, by how they were chosen.

    A unit is a block, or an attention or MLP alone, the same in all entries of a profile.

    Attributes:
        chosen: `chain` are the levels of `effort`, `uniform` is spread evenly.
        seed: of a random choice.
        units: how many are left out.
        generated_fraction: share of full depth's compute on generated tokens.
        quality: as measured, on the same items as the points.
    """

    chosen: Literal["chain", "uniform", "random"]
    seed: int | None = None
    units: int
    generated_fraction: float
    quality: Interval


class FailedSetting(Strict):
    """A setting that was tried, and not measured any further.

    Attributes:
        name: of the setting.
        routing: the wire object that asks for it.
        reason: why.
    """

    name: str
    routing: dict[str, Any]
    reason: str


class FrontierFields(Strict):
    """Settings measured together.

    Attributes:
        measure: what quality is: on tasks `exact match` of free answers, `choices` where the
            likeliest is right, or both; on prompts `token agreement`, that of `TokenMeasures`, or,
            in profiles made before that was measured, `agreement` up to the first difference.
        items: that quality was measured on.
        batch: requests at a time while speed was measured.
        device: that it was measured on.
        mode: how the engine ran the model while speed was measured; profiles made before this was
            kept were measured eager.
        points: full depth first.
        presets: point by preset.
        effort: nested levels, from the fullest on; full depth is not among them.
        equal_compute: other choices of as many units as the levels leave out, beside them.
        notes: what the measurements do not show of the presets, in words.
        noise: full depth against itself, in another order and other batches; None in profiles made
            before that was measured.
        chosen_by: what presets were chosen by, in words.
        failed: settings that lose so much that their speed was not measured.
    """

    measure: Literal[
        "exact match", "choices", "exact match and choices", "token agreement", "agreement"
    ]
    items: int
    batch: int
    device: str
    mode: EngineMode = "eager"
    points: tuple[FrontierPoint, ...]
    presets: dict[str, str]
    effort: tuple[EffortLevel, ...]
    equal_compute: tuple[EqualCompute, ...] = ()
    notes: tuple[str, ...] = ()
    noise: TokenMeasures | None = None
    chosen_by: str = ""
    failed: tuple[FailedSetting, ...] = ()
