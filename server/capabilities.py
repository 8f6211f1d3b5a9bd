"""What the served model can be asked for, read from vLLM's configuration once at start-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sluice.models.families import family_of
from sluice.models.policy import Phase
from sluice.models.support import depth_refusal


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Limits that a policy is checked against.

    Attributes:
        models: ids under which the base model is served; the first is its name.
        architecture: vLLM's name of the architecture.
        layers: decoder layers.
        experts: routed experts per layer, 0 for a dense model.
        refusal: why no routing can be done on this engine, or None.
    """

    models: tuple[str, ...]
    architecture: str
    layers: int
    experts: int
    refusal: str | None

    @classmethod
    def of(cls, vllm_config: Any, models: tuple[str, ...]) -> Capabilities:
        """Capabilities of an engine.

        Args:
            vllm_config: vLLM's `VllmConfig`.
            models: served ids of the base model.
        """
        model = vllm_config.model_config
        return cls(
            models=models,
            architecture=model.architecture,
            layers=model.get_total_num_hidden_layers(),
            experts=model.get_num_experts(),
            refusal=depth_refusal(vllm_config),
        )

    def to_wire(self) -> dict[str, Any]:
        """Body of `GET /v1/routing/capabilities`."""
        family = family_of(self.architecture)
        methods = {"skip": ["blocks", "attention", "mlp"], "phase": [p.value for p in Phase]}
        return {
            "object": "routing.capabilities",
            "model": self.models[0],
            "architecture": self.architecture,
            "family": family.name if family else None,
            "supported": self.refusal is None,
            "reason": self.refusal,
            "layers": self.layers,
            "experts": self.experts,
            "depth": methods if self.refusal is None else {},
            "report": self.refusal is None,
        }
