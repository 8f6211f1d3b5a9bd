"""`profile.json` of a profile, as it is on disk; see `sluice.models.profile.profile`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from sluice.models.profile.expert_fields import (
    BehaviourFields,
    ExpertBudgetLevel,
    ExpertMap,
    ReferenceSet,
)
from sluice.models.profile.frontier_fields import FrontierFields
from sluice.models.profile.layer_fields import (
    AdapterFields,
    ExitThreshold,
    FoundSkipSet,
    ImportanceEvidence,
    ImportanceFields,
    LayerMetrics,
)
from sluice.models.profile.values import PerLayer, Strict


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
    versions: dict[str, str] = Field(default_factory=dict)


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
    calibration: dict[str, StepFields] = Field(default_factory=dict)
    skipped_steps: dict[str, str] = Field(default_factory=dict)
    importance: ImportanceFields | None = None
    importance_evidence: ImportanceEvidence | None = None
    layer_metrics: LayerMetrics | None = None
    exits: tuple[ExitThreshold, ...] = ()
    exit_failures: dict[str, str] = Field(default_factory=dict)
    saturation: PerLayer | None = None
    super_experts: tuple[tuple[int, int], ...] = ()
    expert_map: ExpertMap | None = None
    behaviours: dict[str, BehaviourFields] = Field(default_factory=dict)
    expert_k: tuple[ExpertBudgetLevel, ...] = ()
    skip_ratios: PerLayer | None = None
    references: dict[str, ReferenceSet] = Field(default_factory=dict)
    skip_sets: dict[str, FoundSkipSet] = Field(default_factory=dict)
    adapters: dict[str, AdapterFields] = Field(default_factory=dict)
    frontier: FrontierFields | None = None
    files: dict[str, str] = Field(default_factory=dict)
    digest: str = ""
