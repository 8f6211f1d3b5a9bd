"""`profile.json` of a profile, as it is on disk; see `sluice.models.profile.profile`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

OWN_ENCODER = "model"
"""Encoder of the reference sets whose prompt embeddings are the model's own."""

Share = Annotated[float, Field(ge=0, le=1)]
EngineMode = Literal["compiled", "eager"]
"""How an engine runs a model: compiled or captured in graphs, or neither."""
Layers = tuple[int, ...]
PerLayer = tuple[float, ...]
"""One number a decoder layer."""


class Strict(BaseModel):
    """Unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelFields(Strict):
    """The model that a profile is bound to.

    Attributes:
        layers: number of decoder layers.
        hidden: width of the residual stream.
        fingerprint: `sluice.models.profile.fingerprint`.
        name: of its folder, or of its repository on the hub; None in profiles made before it was
            kept.
        experts: whether a layer has routed experts; None in profiles made before it was kept.
    """

    layers: int
    hidden: int
    fingerprint: str
    name: str | None = None
    experts: bool | None = None


class StepFields(Strict):
    """How a step of the calibration was run, for the record.

    Attributes:
        settings: its options.
        examples: how many it was run on.
        data: digest of those examples.
        key: digest of all that the step's result depends on.
        date: UTC day on which it was run, ISO 8601; None in profiles made before it was kept.
        versions: of what ran it, by package; empty in profiles made before they were kept.
    """

    settings: dict[str, Any]
    examples: int
    data: str
    key: str
    date: str | None = None
    versions: dict[str, str] = {}


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


class Interval(Strict):
    """A measured value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


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


class ProfileFields(Strict):
    """All of `profile.json`.

    Attributes:
        schema_version: of this description.
        skipped_steps: steps that the last whole run could not do, and why.
        exit_failures: why exit methods that were tried have no threshold.
        files: SHA-256 of the profile's other files by name.
        digest: SHA-256 of all the other fields; see `sluice.models.profile.writer`.
    """

    schema_version: int
    model: ModelFields
    calibration: dict[str, StepFields] = {}
    skipped_steps: dict[str, str] = {}
    importance: ImportanceFields | None = None
    importance_evidence: ImportanceEvidence | None = None
    layer_metrics: LayerMetrics | None = None
    exits: tuple[ExitThreshold, ...] = ()
    exit_failures: dict[str, str] = {}
    saturation: PerLayer | None = None
    super_experts: tuple[tuple[int, int], ...] = ()
    expert_map: ExpertMap | None = None
    behaviours: dict[str, BehaviourFields] = {}
    expert_k: tuple[ExpertBudgetLevel, ...] = ()
    skip_ratios: PerLayer | None = None
    references: dict[str, ReferenceSet] = {}
    skip_sets: dict[str, FoundSkipSet] = {}
    frontier: FrontierFields | None = None
    files: dict[str, str] = {}
    digest: str = ""
