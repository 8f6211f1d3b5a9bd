"""The response's `routing` object: what ran of a policy, from the worker's record."""

from __future__ import annotations

from typing import Any

from sluice.models.policy.axes import DECODE, EXECUTED, MODULES, OUTCOMES
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.telemetry.request_record import RoutingRecord

_NEIGHBOURS = (
    "budget methods share experts between the requests of a step: "
    "this answer depended on its neighbours"
)


def build_report(policy: RoutingPolicy, record: RoutingRecord | None) -> dict[str, Any]:
    """What ran, as counted by the worker, in JSON values.

    `exit_layers` is there under an exit rule, `token_layers` for a single sample, `mask` where the
    prompt decided one, `experts` with expert controls.

    Args:
        policy: the effective policy.
        record: of the request, or None if it was lost.
    """
    report: dict[str, Any] = {"policy": policy.to_dict()}
    if record is None:
        return {**report, "warnings": ["the engine kept no record of this request"]}
    report["layers"] = [
        {
            "layer": layer,
            **{
                module: dict(zip(OUTCOMES, outcomes, strict=True))
                for module, outcomes in zip(MODULES, modules, strict=True)
            },
        }
        for layer, modules in enumerate(record.counts.sum(axis=0).tolist())
    ]
    report["compute_fraction"] = _rounded(record.compute_fraction)
    report["exits"] = [
        {"layer": layer, "tokens": tokens} for layer, tokens in enumerate(record.exits.tolist())
    ]
    if record.exit_layers:
        report["exit_layers"] = list(record.exit_layers)
    if record.token_layers:
        report["token_layers"] = list(record.token_layers)
    report["generated"] = _generated(record)
    if record.mask is not None:
        report["mask"] = record.mask
    said = []
    if record.experts is not None:
        report["experts"] = {
            name: _rounded(value) if isinstance(value, float) else value
            for name, value in record.experts.to_wire().items()
        }
        if record.experts.neighbour_dependent:
            said.append(_NEIGHBOURS)
    report["warnings"] = said
    return report


def _generated(record: RoutingRecord) -> dict[str, Any]:
    """Depth of the generated tokens; no mean where no step ran for any of them."""
    tokens = int(record.exits.sum())
    executed = int(record.counts[DECODE, ..., EXECUTED].sum())
    return {
        "tokens": tokens,
        "mean_layers": _rounded(executed / len(MODULES) / tokens) if tokens else None,
        "compute_fraction": _rounded(record.generated_compute_fraction),
    }


def _rounded(value: float) -> float:
    return round(value, 6)
