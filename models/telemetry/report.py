"""The response's `routing` object: what ran of a policy, from the worker's record."""

from __future__ import annotations

from typing import Any

from sluice.models.policy.axes import EXECUTED, MODULES, OUTCOMES
from sluice.models.policy.policy import RoutingPolicy

_NEIGHBOURS = (
    "budget methods share experts between the requests of a step: "
    "this answer depended on its neighbours"
)


def build_report(policy: RoutingPolicy, record: dict[str, Any] | None) -> dict[str, Any]:
    """What ran, as counted by the worker.

    Args:
        policy: the effective policy.
        record: the worker's record (`sluice.models.telemetry.layer_counters`); None if it was
            lost. `counts` is nested as 2 phases (prompt, generated) x layers x modules x outcomes;
            `exits` counts generated tokens by the last layer that they ran anything in;
            `exit_layers` is there under an exit rule, `mask` where the prompt decided one,
            `experts` (active_mean, masked, loaded_per_step, neighbour_dependent, and `weak` of a
            contrast) with routed experts.
    """
    report: dict[str, Any] = {"policy": policy.to_dict()}
    if record is None:
        return {**report, "warnings": ["the engine kept no record of this request"]}
    prompt, generated = record["counts"]
    report["layers"] = [
        {
            "layer": layer,
            **{
                module: dict(zip(OUTCOMES, map(sum, zip(*phases, strict=True)), strict=True))
                for module, phases in zip(MODULES, zip(*modules, strict=True), strict=True)
            },
        }
        for layer, modules in enumerate(zip(prompt, generated, strict=True))
    ]
    report["compute_fraction"] = _rounded(record["compute_fraction"])
    report["exits"] = [
        {"layer": layer, "tokens": tokens} for layer, tokens in enumerate(record["exits"])
    ]
    if "exit_layers" in record:
        report["exit_layers"] = record["exit_layers"]
    report["generated"] = _generated(record, generated)
    if "mask" in record:
        report["mask"] = record["mask"]
    warnings = []
    if "experts" in record:
        report["experts"] = _all_rounded(record["experts"])
        if record["experts"]["neighbour_dependent"]:
            warnings.append(_NEIGHBOURS)
    report["warnings"] = warnings
    return report


def _generated(record: dict[str, Any], counts: list[Any]) -> dict[str, Any]:
    """Depth of the generated tokens; no mean where no step ran for any of them."""
    tokens = sum(record["exits"])
    executed = sum(module[EXECUTED] for modules in counts for module in modules)
    return {
        "tokens": tokens,
        "mean_layers": _rounded(executed / len(MODULES) / tokens) if tokens else None,
        "compute_fraction": _rounded(record["generated_compute_fraction"]),
    }


def _rounded(value: float) -> float:
    return round(value, 6)


def _all_rounded(value: Any) -> Any:
    """JSON values with every float in them rounded."""
    if isinstance(value, dict):
        return {name: _all_rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_all_rounded(part) for part in value]
    return _rounded(value) if isinstance(value, float) else value
