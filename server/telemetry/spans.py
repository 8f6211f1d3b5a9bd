"""Attributes of a routed request's span beside vLLM's: a fixed set of names."""

from __future__ import annotations

from typing import Any

from sluice.models.telemetry.report import build_report
from sluice.models.telemetry.request_record import RoutingRecord
from sluice.models.vllm_adapter.patches.tracing import Attributes
from sluice.server.admission import Admitted


def policy_attributes(admitted: Admitted) -> Attributes:
    """What the request asked for: names and numbers, never its text or its lists of layers."""
    policy = admitted.extra.policy
    return _given(
        {
            "sluice.preset": admitted.preset,
            "sluice.policy.digest": policy.digest,
            "sluice.policy.effort": admitted.effort,
            "sluice.policy.skip.attention": len(policy.skip.attention) or None,
            "sluice.policy.skip.mlp": len(policy.skip.mlp) or None,
            "sluice.policy.skip.phase": None if policy.skip.empty else policy.skip.phase.value,
            "sluice.policy.exit.method": policy.exit and policy.exit.method,
            "sluice.policy.adaptive.method": policy.adaptive and policy.adaptive.method,
            "sluice.policy.experts": sorted(policy.experts.to_dict()) or None,
        }
    )


def ran_attributes(admitted: Admitted, record: RoutingRecord | None) -> Attributes:
    """What the request ran; nothing if the engine has no record of it."""
    if record is None:
        return {}
    report = build_report(admitted.extra.policy, record)
    generated, experts = report["generated"], report.get("experts", {})
    return _given(
        {
            "sluice.compute_fraction": report["compute_fraction"],
            "sluice.generated.compute_fraction": generated["compute_fraction"],
            "sluice.generated.mean_layers": generated["mean_layers"],
            "sluice.generated.tokens": generated["tokens"],
            "sluice.exits": [layer["tokens"] for layer in report["exits"]],
            "sluice.experts.active_mean": experts.get("active_mean"),
            "sluice.experts.masked": experts.get("masked"),
        }
    )


def _given(attributes: dict[str, Any]) -> Attributes:
    """Those that have a value; OpenTelemetry has no null."""
    return {name: value for name, value in attributes.items() if value is not None}
