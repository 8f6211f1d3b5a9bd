"""What goes into vLLM's messages at one end comes out at the other, and only that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from sluice.models.policy.axes import PREFILL
from sluice.models.policy.extra_args import EXTRA_ARGS_KEY, RoutingExtraArgs
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.telemetry.inbox import Inbox
from sluice.models.telemetry.ledger import Ledger
from sluice.models.telemetry.step_counts import (
    RequestStep,
    RoutedStepCounts,
    StockStep,
    WorkerCounts,
)
from sluice.models.vllm_adapter.patches import api_telemetry, engine_telemetry
from sluice.models.vllm_adapter.patches.api_telemetry import inbox_of
from sluice.models.vllm_adapter.patches.engine_telemetry import COUNTS_ATTRIBUTE, _Telemetry

LAYERS = 2
FULL = (np.zeros((LAYERS, 2), dtype=np.bool_), np.zeros(LAYERS, dtype=np.bool_))


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    api_telemetry.install()
    engine_telemetry.install()


def ran(*request_ids: str) -> WorkerCounts:
    """A step of one prompt token each."""
    segments = [[index, PREFILL, 0, 1, 0, 0] for index in range(len(request_ids))]
    requests = tuple(RequestStep(name, index) for index, name in enumerate(request_ids))
    step = RoutedStepCounts(np.array(segments), len(request_ids), {0: FULL}, requests)
    return WorkerCounts((step, StockStep(3, 1)), np.array([[4, 0, 4, 1]]))


def always(_: str) -> bool:
    return True


def api_server(*request_ids: str) -> OutputProcessor:
    """A processor that knows these requests, whose keys are their names in capitals."""
    processor = OutputProcessor(None, log_stats=False)
    for name in request_ids:
        inbox_of(processor).expect(name, name.upper())
    return processor


def received(processor: OutputProcessor, outputs: EngineCoreOutputs) -> EngineCoreOutputs:
    """Through vLLM's sockets, and what `AsyncLLM` does with it."""
    sent = MsgpackEncoder().encode(outputs)
    came: EngineCoreOutputs = MsgpackDecoder(EngineCoreOutputs).decode(sent)
    processor.process_outputs(came.outputs, came.timestamp, None)
    processor.update_scheduler_stats(came.scheduler_stats)
    return came


def ends(name: str, **more: Any) -> EngineCoreOutput:
    return EngineCoreOutput(name, [7], finish_reason=FinishReason.LENGTH, **more)


def rows(inbox: Inbox, key: str) -> int | None:
    sums = inbox.take(key)
    return None if sums is None else int(sums.counts.sum())


def test_sums_come_with_the_end_of_a_request_and_leave_no_trace() -> None:
    telemetry = _Telemetry(Ledger(LAYERS), engine=0)
    telemetry.ledger.add(ran("a", "b", "c"), always)
    telemetry.ended.update(a=0, b=0)
    transfer = {"remote": 1}
    outputs = {0: EngineCoreOutputs(outputs=[ends("a"), ends("b", kv_transfer_params=transfer)])}
    telemetry.tell(outputs, idle=False)
    processor = api_server("a", "b", "c")
    came = received(processor, outputs[0])
    assert [output.kv_transfer_params for output in came.outputs] == [None, transfer]
    inbox = inbox_of(processor)
    assert rows(inbox, "A") == rows(inbox, "B") == 2 * LAYERS
    assert not inbox.complete("C")


def test_sums_of_aborted_requests_come_with_the_stats() -> None:
    telemetry = _Telemetry(Ledger(LAYERS), engine=0, clients=2)
    telemetry.ledger.add(ran("a"), always)
    telemetry.ended.update(a=1, never=1)
    outputs: dict[int, EngineCoreOutputs] = {}
    telemetry.tell(outputs, idle=True)
    processor = api_server("a", "never")
    received(processor, outputs[1])
    inbox = inbox_of(processor)
    assert inbox.complete("A")
    assert inbox.complete("NEVER")
    assert rows(inbox, "A") == 2 * LAYERS
    assert rows(inbox, "NEVER") is None
    assert telemetry.ended == {}


def test_every_api_server_gets_the_counts_and_one_of_them_vllms_stats() -> None:
    telemetry = _Telemetry(Ledger(LAYERS), engine=3, clients=3)
    telemetry.ledger.add(ran("a"), always)
    stats = SchedulerStats(num_running_reqs=5, kv_connector_stats={"connector": 1})
    outputs = {1: EngineCoreOutputs(scheduler_stats=stats)}
    telemetry.tell(outputs, idle=True)
    assert outputs.keys() == {0, 1, 2}
    logged = []
    manager = object.__new__(StatLoggerManager)
    manager.stat_loggers = [SimpleNamespace(record=lambda stats, *_, **__: logged.append(stats))]
    for client in range(3):
        processor = api_server()
        came = received(processor, outputs[client])
        manager.record(scheduler_stats=came.scheduler_stats, iteration_stats=None)
        (reading,) = [inbox_of(processor).engines[3].read()]
        assert reading.total.layers.sum() == 2 * LAYERS * 4
        assert reading.total.exits.tolist() == [0, 1]
        assert reading.total.selections.tolist() == [[4, 0, 4, 1]]
    assert logged[0] is logged[2] is None, "they would say that nothing runs"
    assert logged[1].num_running_reqs == 5
    assert logged[1].kv_connector_stats == {"connector": 1}


def test_stats_without_a_connector_are_as_vllm_makes_them() -> None:
    telemetry = _Telemetry(Ledger(LAYERS), engine=0)
    telemetry.ledger.add(ran("a"), always)
    outputs = {0: EngineCoreOutputs(scheduler_stats=SchedulerStats())}
    telemetry.tell(outputs, idle=True)
    came = received(api_server(), outputs[0])
    assert came.scheduler_stats == SchedulerStats()
    telemetry.tell(outputs, idle=True)
    assert MsgpackEncoder().encode(outputs[0])


def test_requests_that_never_reach_the_scheduler_keep_nobody_waiting() -> None:
    processor = api_server("refused")
    refused = EngineCoreOutput("refused", [], finish_reason=FinishReason.ERROR)
    received(processor, EngineCoreOutputs(outputs=[refused]))
    assert inbox_of(processor).complete("REFUSED")


def test_a_dead_engine_keeps_nobody_waiting() -> None:
    processor = api_server("a")
    processor.propagate_error(RuntimeError("dead"))
    assert inbox_of(processor).complete("A")


class FakeScheduler:
    """Frees what it is told to free, as vLLM's does at the end of a request."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: LAYERS),
            parallel_config=SimpleNamespace(data_parallel_index=0),
        )
        self.ends: list[str] = []

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def add(self, name: str, *, routed: bool = True) -> Any:
        extra = {EXTRA_ARGS_KEY: RoutingExtraArgs(RoutingPolicy(), name.upper()).encode()}
        self.requests[name] = SimpleNamespace(
            request_id=name,
            client_index=0,
            sampling_params=SimpleNamespace(extra_args=extra if routed else None),
            is_finished=lambda: False,
        )

    def free(self, name: str) -> None:
        stock = engine_telemetry._noting_ended(lambda scheduler, request: None)
        stock(self, self.requests.pop(name))

    def update(self, told: WorkerCounts | None) -> dict[int, EngineCoreOutputs]:
        def stock(*_: Any) -> dict[int, EngineCoreOutputs]:
            for name in self.ends:
                self.free(name)
            return {0: EngineCoreOutputs(outputs=[ends(name) for name in self.ends])}

        output = SimpleNamespace() if told is None else SimpleNamespace(**{COUNTS_ATTRIBUTE: told})
        update = engine_telemetry._with_telemetry(stock)
        outputs: dict[int, EngineCoreOutputs] = update(self, None, output)
        self.ends = []
        return outputs


def test_an_abort_during_a_step_counts_what_the_step_ran() -> None:
    scheduler, processor = FakeScheduler(), api_server("a", "b")
    scheduler.add("a")
    scheduler.add("b")
    received(processor, scheduler.update(ran("a", "b"))[0])
    scheduler.free("a")
    assert not inbox_of(processor).complete("A")
    received(processor, scheduler.update(ran("a", "b"))[0])
    assert rows(inbox_of(processor), "A") == 2 * 2 * LAYERS
    # One more step that was on its way.
    scheduler.ends = ["b"]
    received(processor, scheduler.update(ran("a", "b"))[0])
    assert rows(inbox_of(processor), "B") == 3 * 2 * LAYERS
    assert _Telemetry.of(scheduler).ledger.take("a") is None, "it would stay for ever"
    total = inbox_of(processor).engines[0].read().total
    assert total.layers.sum() == 3 * (2 * 2 + 2 * 3) * LAYERS


def test_requests_without_routing_and_outputs_without_counts_stay_vllms() -> None:
    scheduler = FakeScheduler()
    scheduler.add("a", routed=False)
    scheduler.ends = ["a"]
    outputs = scheduler.update(None)
    assert outputs[0].outputs == [ends("a")]
    assert outputs[0].scheduler_stats is None
