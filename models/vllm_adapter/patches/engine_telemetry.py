"""Seam: what steps ran travels with vLLM's own messages, from the worker to the API servers.

Wraps `update_from_output` and `_free_request` of vLLM's `Scheduler`, and `process_output_sockets`
of its `EngineCoreProc`.
A worker's output carries what its steps ran, as an attribute. The scheduler adds it up. When a
request ends, its sums go into the output that says so, in `kv_transfer_params`, and so to the API
server whose request it is. Those of a request that was aborted have no such output: they go with
the stats, in `kv_connector_stats`. So do the engine's counts, to every API server, since any of
them may be asked for all. `api_telemetry` takes them out again on the other side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sluice.models.policy.extra_args import EXTRA_ARGS_KEY
from sluice.models.telemetry.ledger import Ledger
from sluice.models.telemetry.step_counts import WorkerCounts
from sluice.models.vllm_adapter.patching import wrap_once

KEY = "sluice"
"""Of our part in vLLM's free-form dictionaries."""

COUNTS_ATTRIBUTE = "sluice_counts"
"""Of a worker's output."""

_TELEMETRY_ATTRIBUTE = "sluice_telemetry"


def install() -> None:
    """Wrap vLLM's scheduler; safe to call twice.

    Raises:
        SeamMovedError: a method is not where 0.32.0 has it.
    """
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCoreProc

    wrap_once(Scheduler, "update_from_output", _with_telemetry)
    wrap_once(Scheduler, "_free_request", _noting_ended)
    wrap_once(EngineCoreProc, "process_output_sockets", _knowing_clients)


@dataclass(slots=True)
class _Telemetry:
    """Of one scheduler.

    Attributes:
        ledger: adds up.
        engine: vLLM's index of the engine.
        clients: API servers.
        ended: API server of each request that has ended, and of which it has not been told.
    """

    ledger: Ledger
    engine: int
    clients: int = 1
    ended: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, scheduler: Any) -> _Telemetry:
        """A scheduler's, made on first use."""
        telemetry: _Telemetry | None = getattr(scheduler, _TELEMETRY_ATTRIBUTE, None)
        if telemetry is None:
            config = scheduler.vllm_config
            ledger = Ledger(config.model_config.get_total_num_hidden_layers())
            telemetry = cls(ledger, config.parallel_config.data_parallel_index)
            setattr(scheduler, _TELEMETRY_ATTRIBUTE, telemetry)
        return telemetry

    def tell(self, outputs: dict[int, Any], *, idle: bool) -> None:
        """Put what there is to tell into the outputs of a step.

        Args:
            outputs: vLLM's `EngineCoreOutputs` by API server.
            idle: no request is left.
        """
        payloads: dict[int, dict[str, Any]] = {}
        for request_id, client, wire in self._records(outputs):
            records = payloads.setdefault(client, {}).setdefault("records", [])
            records.append([request_id, wire])
        flush = self.ledger.flush(idle=idle)
        if flush is not None:
            counts = {"counts": flush.counts.to_wire(), "new_window": flush.new_window}
            for client in range(self.clients):
                payloads.setdefault(client, {}).update(counts, engine=self.engine)
        for client, payload in payloads.items():
            _add_stats(outputs, client, payload)

    def _records(self, outputs: dict[int, Any]) -> list[tuple[str, int, Any]]:
        """Put sums into the outputs that end requests; give those that have no such output."""
        if not self.ended:
            return []
        ends = {
            output.request_id: output
            for per_client in outputs.values()
            for output in per_client.outputs
            if output.finish_reason is not None
        }
        left = []
        for request_id, client in self.ended.items():
            sums = self.ledger.take(request_id)
            wire = None if sums is None else sums.to_wire()
            output = ends.get(request_id)
            if output is None:
                left.append((request_id, client, wire))
            else:
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: wire}
        self.ended.clear()
        return left


def _add_stats(outputs: dict[int, Any], client: int, payload: dict[str, Any]) -> None:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import SchedulerStats

    told = outputs.get(client)
    if told is None:
        told = outputs[client] = EngineCoreOutputs()
    # vLLM gives its stats to one API server, and to none with `--disable-log-stats`.
    payload["alone"] = told.scheduler_stats is None
    stats = told.scheduler_stats or SchedulerStats()
    stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), KEY: payload}
    told.scheduler_stats = stats


def _with_telemetry(stock: Any) -> Callable[..., Any]:
    def update_from_output(scheduler: Any, scheduler_output: Any, model_output: Any) -> Any:
        telemetry = _Telemetry.of(scheduler)
        told: WorkerCounts | None = getattr(model_output, COUNTS_ATTRIBUTE, None)
        if told is not None:
            telemetry.ledger.add(told, lambda request_id: _runs(scheduler, request_id))
        outputs = stock(scheduler, scheduler_output, model_output)
        telemetry.tell(outputs, idle=not scheduler.has_unfinished_requests())
        return outputs

    return update_from_output


def _runs(scheduler: Any, request_id: str) -> bool:
    """Whether a request's sums will still be taken."""
    request = scheduler.requests.get(request_id)
    running = request is not None and not request.is_finished()
    return running or request_id in _Telemetry.of(scheduler).ended


def _noting_ended(stock: Any) -> Callable[..., Any]:
    def free_request(scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        params = request.sampling_params
        if params is not None and EXTRA_ARGS_KEY in (params.extra_args or {}):
            _Telemetry.of(scheduler).ended[request.request_id] = request.client_index
        return stock(scheduler, request, *args, **kwargs)

    return free_request


def _knowing_clients(stock: Any) -> Callable[..., None]:
    def process_output_sockets(core: Any, output_paths: list[str], *args: Any) -> None:
        # The thread that vLLM begins last, when the scheduler is there; one path an API server.
        _Telemetry.of(core.scheduler).clients = len(output_paths)
        stock(core, output_paths, *args)

    return process_output_sockets
