"""What the served model can be asked for, read from vLLM's configuration once at start-up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sluice.models.depth import fixed, mod
from sluice.models.depth.first import First
from sluice.models.depth.lac import LAC, MODES
from sluice.models.depth.method import ExitMethod, Parameter, PromptMethod
from sluice.models.depth.order import Importance, Unit
from sluice.models.depth.registry import EXIT_METHODS, PROMPT_METHODS
from sluice.models.families import family_of
from sluice.models.policy import MissingKV, Phase
from sluice.models.profile import Profile
from sluice.models.support import depth_refusal


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Limits that a policy is checked against.

    Attributes:
        models: ids under which the base model is served; the first is its name.
        architecture: vLLM's name of the architecture.
        layers: decoder layers.
        hidden: hidden size.
        experts: routed experts per layer, 0 for a dense model.
        chunked_prefill: whether the scheduler may cut a prompt into several steps.
        refusal: why no routing can be done on this engine, or None.
        profile: what was measured and trained for this model, or None.
    """

    models: tuple[str, ...]
    architecture: str
    layers: int
    hidden: int
    experts: int
    chunked_prefill: bool
    refusal: str | None
    profile: Profile | None

    @classmethod
    def of(cls, vllm_config: Any, models: tuple[str, ...], profile: Profile | None) -> Capabilities:
        """Capabilities of an engine.

        Args:
            vllm_config: vLLM's `VllmConfig`.
            models: served ids of the base model.
            profile: the one the server was started with.

        Raises:
            ProfileError: the profile was made for a model of another shape.
        """
        model = vllm_config.model_config
        layers, hidden = model.get_total_num_hidden_layers(), model.get_hidden_size()
        if profile is not None:
            profile.check_model(layers, hidden)
        return cls(
            models=models,
            architecture=model.architecture,
            layers=layers,
            hidden=hidden,
            experts=model.get_num_experts(),
            chunked_prefill=vllm_config.scheduler_config.enable_chunked_prefill,
            refusal=depth_refusal(vllm_config),
            profile=profile,
        )

    @property
    def importance(self) -> Importance | None:
        """Importance of the layers as measured, or None."""
        return self.profile.importance if self.profile else None

    def missing_for(self, method: ExitMethod | PromptMethod) -> str | None:
        """Why a method cannot run for want of trained tensors, or None if it can."""
        if not method.profile_tensors:
            return None
        if self.profile is None:
            return f"method {method.name!r} needs a profile: start the server with --profile"
        if method.name not in self.profile.methods:
            return f"the profile has nothing trained for method {method.name!r}"
        return None

    def to_wire(self) -> dict[str, Any]:
        """Body of `GET /v1/routing/capabilities`."""
        family = family_of(self.architecture)
        supported = self.refusal is None
        return {
            "object": "routing.capabilities",
            "model": self.models[0],
            "architecture": self.architecture,
            "family": family.name if family else None,
            "supported": supported,
            "reason": self.refusal,
            "layers": self.layers,
            "hidden_size": self.hidden,
            "experts": self.experts,
            "depth": self._depth() if supported else {},
            "effort": supported,
            "report": supported,
        }

    def _depth(self) -> dict[str, Any]:
        return {
            "skip": {
                "units": ["blocks", "attention", "mlp"],
                "by": [unit.value for unit in Unit],
                "order": "default" if self.importance is None else "profile",
            },
            "exit": {
                **{name: self._exit(method) for name, method in EXIT_METHODS.items()},
                fixed.NAME: _listed({}, fixed.SOURCE, decay=False, kv=[]),
            },
            "adaptive": {
                **{name: self._adaptive(method) for name, method in PROMPT_METHODS.items()},
                mod.NAME: _listed(
                    {"retention": _number(0.0, 1.0, list(mod.cosine_retention(self.layers)))},
                    mod.SOURCE,
                ),
            },
            "phase": [phase.value for phase in Phase],
        }

    def _exit(self, method: ExitMethod) -> dict[str, Any]:
        return _listed(
            _parameters(method.parameters),
            method.source,
            self.missing_for(method),
            decay=method.decays,
            kv=[kv.value for kv in MissingKV],
        )

    def _adaptive(self, method: PromptMethod) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if method.name == LAC.name:
            more["modes"] = list(MODES)
        if method.name == First.name:
            more["masked_prefill"] = not self.chunked_prefill
        return _listed(
            _parameters(method.parameters), method.source, self.missing_for(method), **more
        )


def _listed(
    parameters: dict[str, Any], source: str, reason: str | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "source": source,
        "available": reason is None,
        "reason": reason,
        **more,
    }


def _parameters(parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    return {name: _number(p.low, p.high, p.default) for name, p in parameters.items()}


def _number(low: float, high: float, default: Any) -> dict[str, Any]:
    return {"low": low, "high": high, "default": default}
