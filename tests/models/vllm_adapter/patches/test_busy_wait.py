"""Waiting processes of an engine on a CPU leave the cores to others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from vllm.distributed.device_communicators import shm_broadcast
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition

from sluice.models.vllm_adapter.patches.install import register


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[MessageQueue, MessageQueue]]:
    """Both ends of a queue as between the engine core and its worker: who writes, who reads."""
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)
    register()
    writer = MessageQueue(1, 1)
    reader = MessageQueue.create_from_handle(writer.export_handle(), 0)
    ready = threading.Thread(target=writer.wait_until_ready)
    ready.start()
    reader.wait_until_ready()
    ready.join()
    yield writer, reader
    for each in (reader, writer):
        each.shutdown()


def waited(queue: tuple[MessageQueue, MessageQueue], seconds: float) -> float:
    """Seconds of CPU time that a reader takes to wait so long for a message."""
    writer, reader = queue
    writer.enqueue("first")
    assert reader.dequeue(timeout=5) == "first"
    spent = []

    def read() -> None:
        before = time.thread_time()
        assert reader.dequeue(timeout=60) == "second"
        spent.append(time.thread_time() - before)

    waiting = threading.Thread(target=read)
    waiting.start()
    time.sleep(seconds)
    writer.enqueue("second")
    waiting.join(timeout=30)
    assert spent, "the message was not found"
    return spent[0]


def test_who_waits_sleeps(queue: tuple[MessageQueue, MessageQueue]) -> None:
    # vLLM's own wait spins for all of this time.
    assert waited(queue, 0.8) < 0.4


def test_a_message_is_found_though_the_word_of_it_is_lost(
    queue: tuple[MessageQueue, MessageQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, _ = queue
    monkeypatch.setattr(writer._spin_condition, "notify", lambda: None)
    # By itself vLLM looks again after five seconds.
    monkeypatch.setattr(shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS", 60_000)
    assert waited(queue, 0.2) > 0
