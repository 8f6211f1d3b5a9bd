"""`routing.depth.adaptive`: from its wire form to an `AdaptiveRule`."""

from __future__ import annotations

import math

from sluice.models.depth.adaptive import mod
from sluice.models.depth.adaptive.first import First
from sluice.models.depth.adaptive.lac import LAC, MODES
from sluice.models.depth.adaptive.similarity import Similarity
from sluice.models.depth.method import PromptMethod
from sluice.models.depth.registry import PROMPT_METHODS
from sluice.models.policy.policy import AdaptiveRule
from sluice.models.routing.capabilities import Capabilities
from sluice.models.routing.checks import check_fields, check_trained, combination, invalid, number
from sluice.models.routing.errors import RoutingError
from sluice.models.routing.schema import AdaptiveFields

ADAPTIVE = "routing.depth.adaptive"
_DEFAULT_MODE = "predict"
_EXTRA_FIELDS = {First.name: ("masked_prefill",), LAC.name: ("mode",)}


def adaptive_rule(fields: AdaptiveFields, capabilities: Capabilities) -> AdaptiveRule:
    """Check an adaptive control against its method, the model and the engine.

    Raises:
        RoutingError: unknown or untrained method, a field that the method does not take, misses
            or refuses, or one that would leave out nothing or everything.
    """
    if fields.method == mod.NAME:
        return _mod_rule(fields, capabilities.layers)
    method = PROMPT_METHODS.get(fields.method)
    if method is None:
        known = ", ".join([*PROMPT_METHODS, mod.NAME])
        raise invalid(
            f"adaptive method {fields.method!r} does not exist ({known})", f"{ADAPTIVE}.method"
        )
    check_trained(method, capabilities, ADAPTIVE)
    taken = (*method.parameters, *_EXTRA_FIELDS.get(method.name, ()))
    check_fields(fields, taken, method.name, ADAPTIVE)
    names = [*method.parameters]
    if method.name == Similarity.name:
        names = [_one_of(fields, "threshold", "budget")]
    numbers = {name: _number(fields, name, method) for name in names}
    if "budget" in numbers:
        _check_budget(numbers["budget"], capabilities.layers)
    return AdaptiveRule(
        method=method.name,
        mode=_mode(fields) if method.name == LAC.name else None,
        threshold=numbers.get("threshold"),
        budget=numbers.get("budget"),
        masked_prefill=_masked_prefill(fields, capabilities),
    )


def _number(fields: AdaptiveFields, name: str, method: PromptMethod) -> float:
    value = getattr(fields, name)
    return number(value, method.parameters[name], method.name, f"{ADAPTIVE}.{name}")


def _one_of(fields: AdaptiveFields, first: str, second: str) -> str:
    """Which of two fields was given."""
    given = [name for name in (first, second) if getattr(fields, name) is not None]
    if len(given) != 1:
        count = "both" if given else "neither"
        raise invalid(
            f"method {fields.method!r} takes either {first} or {second}, and {count} came",
            f"{ADAPTIVE}.{second if given else first}",
        )
    return given[0]


def _check_budget(budget: float, num_layers: int) -> None:
    skipped = math.floor(num_layers * (1.0 - budget) + 0.5)
    param = f"{ADAPTIVE}.budget"
    if skipped == 0:
        raise invalid(f"budget {budget:g} leaves out none of {num_layers} blocks", param)
    if skipped == num_layers:
        raise RoutingError(
            f"budget {budget:g} leaves nothing to run: it keeps none of {num_layers} blocks",
            param=param,
            reason="nothing_left_to_run",
        )


def _mode(fields: AdaptiveFields) -> str:
    mode = _DEFAULT_MODE if fields.mode is None else fields.mode
    if mode not in MODES:
        raise invalid(f"mode {mode!r} is none of {', '.join(MODES)}", f"{ADAPTIVE}.mode")
    return mode


def _masked_prefill(fields: AdaptiveFields, capabilities: Capabilities) -> bool:
    if fields.masked_prefill and capabilities.chunked_prefill:
        raise combination(
            "masked_prefill needs the whole prompt in one step: "
            "start the server with --no-enable-chunked-prefill",
            f"{ADAPTIVE}.masked_prefill",
        )
    return bool(fields.masked_prefill)


def _mod_rule(fields: AdaptiveFields, num_layers: int) -> AdaptiveRule:
    check_fields(fields, ("retention",), mod.NAME, ADAPTIVE)
    param = f"{ADAPTIVE}.retention"
    given = None if fields.retention is None else tuple(fields.retention)
    if given is not None and len(given) != num_layers:
        raise invalid(
            f"retention has {len(given)} numbers, and the model {num_layers} layers", param
        )
    if all(share == 1.0 for share in given or mod.cosine_retention(num_layers)):
        raise invalid("every layer would keep every token: there is nothing to do", param)
    return AdaptiveRule(method=mod.NAME, retention=given)
