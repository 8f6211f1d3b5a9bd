"""What the served model can be asked for, read from vLLM's configuration once at start-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sluice.models.depth.method import DepthMethod
from sluice.models.depth.registry import methods
from sluice.models.depth.skip_order import Importance
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.profile.expert_fields import OWN_ENCODER, ReferenceSet
from sluice.models.profile.frontier_fields import EffortLevel, EngineMode
from sluice.models.profile.layer_fields import AdapterFields, ExitThreshold
from sluice.models.profile.profile import Profile, ProfileError
from sluice.models.vllm_adapter.engine_mode import engine_mode
from sluice.models.vllm_adapter.families import depth_refusal


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
        expert_shape: of the routed experts, or None if there are none to control.
        expert_refusal: why no expert control can be done, or None if it can.
        expert_routing: whether the server lets requests control experts.
        contrast_refusal: why no contrast can be done, or None if it can.
        mode: how the engine runs the model.
    """

    models: tuple[str, ...]
    architecture: str
    layers: int
    hidden: int
    experts: int
    chunked_prefill: bool
    refusal: str | None
    profile: Profile | None
    expert_shape: ExpertShape | None
    expert_refusal: str | None
    expert_routing: bool
    contrast_refusal: str | None
    mode: EngineMode = "eager"

    @classmethod
    def of(
        cls,
        vllm_config: Any,
        models: tuple[str, ...],
        profile: Profile | None,
        expert_answer: Mapping[str, Any],
        expert_routing: bool,
    ) -> Capabilities:
        """Capabilities of an engine.

        Args:
            vllm_config: vLLM's `VllmConfig`.
            models: served ids of the base model.
            profile: the one the server was started with.
            expert_answer: a worker's `shape`, JSON of an `ExpertShape` or None, and `refusal`,
                text or None.
            expert_routing: whether the server lets requests control experts.

        Raises:
            MethodDefinitionError: a depth method is not fit to run.
            ProfileError: the profile was made for another model.
            FingerprintError: there is a profile, and the model's files cannot be read.
        """
        methods()  # One that is defined wrongly stops the start and not a request.
        model = vllm_config.model_config
        layers, hidden = model.get_total_num_hidden_layers(), model.get_hidden_size()
        if profile is not None:
            profile.check_served(model)
        shape, refusal = expert_answer["shape"], expert_answer["refusal"]
        expert_shape = None if shape is None else ExpertShape.from_dict(shape)
        if expert_shape is None and refusal is None:
            refusal = depth_refusal(vllm_config) or "the model has no routed experts"
        experts = model.get_num_experts()
        if profile is not None and (expert_shape is not None or experts == 0):
            check_profile_experts(profile, expert_shape)
        return cls(
            models=models,
            architecture=model.architecture,
            layers=layers,
            hidden=hidden,
            experts=experts,
            chunked_prefill=vllm_config.scheduler_config.enable_chunked_prefill,
            refusal=depth_refusal(vllm_config),
            profile=profile,
            expert_shape=expert_shape,
            expert_refusal=refusal,
            expert_routing=expert_routing,
            contrast_refusal=_contrast_refusal(vllm_config),
            mode=engine_mode(vllm_config),
        )

    @property
    def importance(self) -> Importance | None:
        """Importance of the layers as measured, or None."""
        return self.profile.importance if self.profile else None

    @property
    def order_refusal(self) -> str | None:
        """Why nobody can say which layers go first, or None if the profile can."""
        if self.importance is not None:
            return None
        return (
            "no profile says which layers this model can do without: measure them with "
            "`sluice calibrate MODEL --quick`, and start the server with --profile"
        )

    @property
    def speed_warning(self) -> str | None:
        """That the profile's speeds are of an engine that runs otherwise, or None."""
        frontier = self.profile.frontier if self.profile else None
        if frontier is None or frontier.mode == self.mode:
            return None
        eager = " --enforce-eager" if self.mode == "eager" else ""
        return (
            f"the profile's speeds were measured in an engine that ran {frontier.mode}, and this "
            f"one runs {self.mode}: measure them again with `sluice calibrate frontier{eager}`"
        )

    @property
    def adapters(self) -> Mapping[str, AdapterFields]:
        """Adapters that were trained for skip sets, by name."""
        return self.profile.fields.adapters if self.profile else {}

    @property
    def references(self) -> Mapping[str, ReferenceSet]:
        """Re-mix reference sets of the profile by name."""
        return self.profile.references if self.profile else {}

    @property
    def effort_levels(self) -> Sequence[EffortLevel]:
        """Measured levels of effort, from the fullest on; none without a frontier."""
        frontier = self.profile.frontier if self.profile else None
        return frontier.effort if frontier else ()

    def calibrated_exits(self, method: str) -> Sequence[ExitThreshold]:
        """Thresholds of an exit method that the profile has; the first is its default."""
        return self.profile.exits(method) if self.profile else ()

    def missing_for(self, method: DepthMethod) -> str | None:
        """Why a method cannot run for want of trained tensors, or None if it can."""
        if not method.profile_tensors:
            return None
        if self.profile is None:
            return f"method {method.name!r} needs a profile: start the server with --profile"
        if method.name not in self.profile.methods:
            return f"the profile has nothing trained for method {method.name!r}"
        return None


def check_profile_experts(profile: Profile, shape: ExpertShape | None) -> None:
    """Experts and layers with experts that a profile names exist in the model.

    Args:
        profile: fits the model's layers and hidden size.
        shape: of the model's experts; None for a dense model.

    Raises:
        ProfileError: names the first entry that does not.
    """
    lists = {"super_experts": profile.super_experts}
    for name, behaviour in profile.fields.behaviours.items():
        lists[f"behaviours.{name}.experts"] = behaviour.experts
    for path, named in lists.items():
        for position, (layer, expert) in enumerate(named):
            if not _has_layer(shape, layer) or not 0 <= expert < (shape.experts if shape else 0):
                raise _error(
                    profile,
                    f"{path}.{position}: the model has no expert {expert} in layer {layer}",
                )
    for name, references in profile.references.items():
        _check_references(profile, name, references, shape)


def _check_references(
    profile: Profile, name: str, references: ReferenceSet, shape: ExpertShape | None
) -> None:
    for layer in references.layers:
        if not _has_layer(shape, layer):
            raise _error(
                profile, f"references.{name}: layer {layer} of the model has no routed experts"
            )
    if not references.layers or [*references.layers] != sorted({*references.layers}):
        raise _error(profile, f"references.{name}: layers must be ascending, each named once")
    if references.encoder == OWN_ENCODER and references.width != profile.hidden:
        raise _error(
            profile,
            f"references.{name}: the model's embeddings are {profile.hidden} wide, "
            f"and these {references.width}",
        )


def _has_layer(shape: ExpertShape | None, layer: int) -> bool:
    return shape is not None and layer in shape.layers


def _error(profile: Profile, problem: str) -> ProfileError:
    return ProfileError(f"profile {profile.folder}: {problem}")


def _contrast_refusal(vllm_config: Any) -> str | None:
    """Why the K/V cache cannot hold a longest request and its weak pass, or None if it can."""
    blocks = vllm_config.cache_config.num_gpu_blocks
    if blocks is None:
        return None
    size = vllm_config.cache_config.block_size
    longest = vllm_config.model_config.max_model_len
    # Layers with a window have blocks of their own in the same pool, and a weak pass frees none.
    windowed = getattr(vllm_config.model_config.hf_text_config, "sliding_window", None) is not None
    # vLLM keeps one block for itself.
    needed = 2 * (2 if windowed else 1) * -(-longest // size) + 1
    if blocks >= needed:
        return None
    return (
        f"the K/V cache has {blocks} blocks of {size} tokens, and two passes over a longest "
        f"request of {longest} tokens need {needed}: give it more memory or lower --max-model-len"
    )
