"""From the fields of `routing` to a policy: presets merged, controls combined.

The controls are in modules of their own: `depth.skip` and effort, `depth.exit`, `depth.adaptive`,
and those of the experts behind `experts.controls`.
"""

from __future__ import annotations

from collections.abc import Mapping

from sluice.models.depth.method import StaticExit
from sluice.models.depth.registry import offered_exits
from sluice.models.policy.policy import Phase, RoutingPolicy, SkipSet
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.checks import combination, invalid
from sluice.models.routing.depth.adaptive import ADAPTIVE, adaptive_rule
from sluice.models.routing.depth.exit import exit_control, is_static
from sluice.models.routing.depth.skip import EFFORT, PHASE, SKIP, effort_set, skip_set
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.experts.controls import CONTRAST, expert_rule, merge_experts
from sluice.models.routing.schema import DepthFields, PresetFields, RoutingFields


def merge_preset(
    fields: RoutingFields, presets: Mapping[str, PresetFields], preset_param: str
) -> RoutingFields:
    """The fields with the preset's filled in.

    `depth.skip`, `depth.exit`, `depth.adaptive`, `depth.phase` and `effort`, where given, each
    replace the preset's as a whole; so does every field of `experts` (`merge_experts`).

    Args:
        fields: of the request.
        presets: by name.
        preset_param: dotted path of what selected the preset.

    Raises:
        RoutingError: the preset does not exist.
    """
    if fields.preset is None:
        return fields
    preset = presets.get(fields.preset)
    if preset is None:
        known = ", ".join(sorted(presets)) or "none are loaded"
        raise RoutingError(
            f"preset {fields.preset!r} does not exist (presets: {known})",
            param=preset_param,
            reason="unknown_preset",
        )
    given, base = fields.depth, preset.depth
    depth = DepthFields(
        skip=given.skip or base.skip,
        exit=given.exit or base.exit,
        adaptive=given.adaptive or base.adaptive,
        phase=given.phase or base.phase,
    )
    effort = preset.effort if fields.effort is None else fields.effort
    experts = merge_experts(fields.experts, preset.experts)
    return fields.model_copy(update={"depth": depth, "effort": effort, "experts": experts})


def resolve(fields: RoutingFields, capabilities: Capabilities) -> RoutingPolicy:
    """The policy of merged fields.

    Raises:
        RoutingError: the engine runs no routing, a control cannot be done on this model, or
            controls that do not go together.
    """
    if capabilities.refusal is not None:
        raise RoutingError(
            f"routing is not available: {capabilities.refusal}",
            param="routing",
            reason="unsupported_model",
        )
    depth = fields.depth
    _check_phase(fields)
    skip = SkipSet()
    if depth.skip is not None:
        skip = skip_set(depth.skip, depth.phase, capabilities)
    rule = None
    if depth.exit is not None:
        if skip.adapter:
            raise combination(
                "an adapter was trained for tokens that run all other layers: "
                "it does not go together with depth.exit",
                f"{SKIP}.adapter",
            )
        skip, rule = exit_control(depth.exit, skip, depth.phase or Phase.BOTH, capabilities)
    adaptive = None
    if depth.adaptive is not None:
        adaptive = adaptive_rule(depth.adaptive, capabilities)
        if depth.exit is not None or not skip.empty:
            other = "depth.skip" if depth.exit is None else "depth.exit"
            raise combination(f"depth.adaptive does not go together with {other}", ADAPTIVE)
    if fields.effort is not None:
        if depth.exit is not None or depth.adaptive is not None or not skip.empty:
            raise combination(
                "effort leaves the choice to the server: "
                "it does not go together with depth.skip, depth.exit or depth.adaptive",
                EFFORT,
            )
        skip = effort_set(fields.effort, depth.phase or Phase.DECODE, capabilities)
    experts = expert_rule(fields.experts, capabilities)
    if experts.contrast is not None:
        shallow = rule is not None or adaptive is not None or not skip.empty
        if shallow or fields.effort is not None:
            raise combination("contrast does not go together with depth or effort", CONTRAST)
    return RoutingPolicy(
        skip=skip, exit=rule, adaptive=adaptive, experts=experts, report=fields.report
    )


def _check_phase(fields: RoutingFields) -> None:
    depth = fields.depth
    if depth.phase is None:
        return
    if depth.adaptive is not None:
        raise combination("an adaptive method has its own phases", PHASE)
    if depth.skip is None and fields.effort is None and not is_static(depth.exit):
        static = [name for name, m in offered_exits().items() if isinstance(m, StaticExit)]
        raise invalid(
            "depth.phase has nothing to act on without depth.skip, depth.exit of method "
            f"{' or '.join(map(repr, static))} or effort",
            PHASE,
        )
