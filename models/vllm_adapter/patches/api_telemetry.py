"""Seam: what engines tell is taken out of vLLM's messages where answers are served.

Wraps methods of vLLM's `OutputProcessor`, and `StatLoggerManager.record`. What `engine_telemetry`
has put into outputs and stats goes to an `Inbox`. It must not stay there: a client would see it in
its answer, and vLLM's logger of K/V transfers would stumble over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sluice.models.policy.extra_args import RoutingExtraArgs
from sluice.models.telemetry.counts import Counts
from sluice.models.telemetry.inbox import Inbox
from sluice.models.vllm_adapter.patches.engine_telemetry import KEY
from sluice.models.vllm_adapter.patching import wrap_once

_INBOX_ATTRIBUTE = "sluice_inbox"
_ALONE_ATTRIBUTE = "sluice_alone"


def install() -> None:
    """Wrap vLLM's output processor; safe to call twice.

    Raises:
        SeamMovedError: a method is not where 0.32.0 has it.
    """
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.loggers import StatLoggerManager

    wrap_once(OutputProcessor, "add_request", _expecting)
    wrap_once(OutputProcessor, "process_outputs", _taking_records)
    wrap_once(OutputProcessor, "update_scheduler_stats", _taking_stats)
    wrap_once(OutputProcessor, "propagate_error", _failing)
    wrap_once(StatLoggerManager, "record", _without_ours)


def inbox_of(processor: Any) -> Inbox:
    """Where a vLLM `OutputProcessor` leaves what engines tell."""
    inbox: Inbox | None = getattr(processor, _INBOX_ATTRIBUTE, None)
    if inbox is None:
        inbox = Inbox()
        setattr(processor, _INBOX_ATTRIBUTE, inbox)
    return inbox


def _expecting(stock: Any) -> Callable[..., None]:
    def add_request(processor: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        stock(processor, request, *args, **kwargs)
        params = request.sampling_params
        extra = params and RoutingExtraArgs.from_extra_args(params.extra_args)
        if extra:
            inbox_of(processor).expect(request.request_id, extra.request_key)

    return add_request


def _taking_records(stock: Any) -> Callable[..., Any]:
    def process_outputs(processor: Any, outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            if output.finish_reason is not None:
                params = output.kv_transfer_params or {}
                # What never reached the scheduler has no record: a request that was refused.
                inbox_of(processor).arrive(output.request_id, params.pop(KEY, None))
                output.kv_transfer_params = params or None
        return stock(processor, outputs, *args, **kwargs)

    return process_outputs


def _taking_stats(stock: Any) -> Callable[..., None]:
    def update_scheduler_stats(processor: Any, stats: Any) -> None:
        told = None if stats is None else (stats.kv_connector_stats or {}).pop(KEY, None)
        if told is not None:
            stats.kv_connector_stats = stats.kv_connector_stats or None
            _deliver(inbox_of(processor), told)
            if told["alone"]:
                setattr(stats, _ALONE_ATTRIBUTE, True)
                stats = None
        stock(processor, stats)

    return update_scheduler_stats


def _deliver(inbox: Inbox, told: dict[str, Any]) -> None:
    for request_id, wire in told.get("records", ()):
        inbox.arrive(request_id, wire)
    if "counts" in told:
        counts = Counts.from_wire(told["counts"])
        inbox.count(told["engine"], counts, new_window=told["new_window"])


def _failing(stock: Any) -> Callable[..., None]:
    def propagate_error(processor: Any, error: Exception) -> None:
        inbox_of(processor).fail()
        stock(processor, error)

    return propagate_error


def _without_ours(stock: Any) -> Callable[..., None]:
    def record(manager: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        # These would say that nothing runs and nothing waits.
        alone = getattr(scheduler_stats, _ALONE_ATTRIBUTE, False)
        stock(manager, None if alone else scheduler_stats, *args, **kwargs)

    return record
