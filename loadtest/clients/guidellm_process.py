"""guidellm benchmarks, one after the other, in a process of their own.

Each line of standard input names a file with guidellm's configuration. Standard output answers
`started` with the moment in Unix seconds, and `done`.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

STARTED, DONE = "started", "done"
_BACKEND = "sluice.loadtest.clients.guidellm_backend"


def main() -> None:
    """Run benchmarks until standard input ends."""
    # guidellm's workers are forked from a process that has imported all of this once.
    multiprocessing.set_forkserver_preload([_BACKEND, "guidellm.scheduler.worker"])
    __import__(_BACKEND)
    _announce_start()
    _check_end_on_every_update()
    for line in sys.stdin:
        asyncio.run(_run(json.loads(Path(line.strip()).read_text(encoding="utf-8"))))
        print(DONE, flush=True)


def _announce_start() -> None:
    """Print when requests begin; guidellm says it nowhere."""
    from guidellm.scheduler.strategies import SchedulingStrategy

    original = SchedulingStrategy.init_processes_start

    def announce(strategy: Any, start_time: float) -> None:
        print(STARTED, start_time, flush=True)
        original(strategy, start_time)

    setattr(SchedulingStrategy, original.__name__, announce)


def _check_end_on_every_update() -> None:
    """Have guidellm look for its end whenever its state changes.

    Version 0.8.1 looks only when word of a request comes. If the last word comes before the data
    set is known to be at its end, it waits for ever.
    """
    from guidellm.scheduler.worker_group import WorkerGroupState

    original = WorkerGroupState.update_state

    def update_and_check(group: Any, *given: Any, **named: Any) -> Any:
        update = original(group, *given, **named)
        if group.stop_send_requests_event.is_set() and not update.state.queued_requests:
            group.requests_generated_event.set()
            if update.stop_processing:
                group.constraint_reached_event.set()
                if update.state.processed_requests == update.state.created_requests:
                    group.shutdown_event.set()
        return update

    setattr(WorkerGroupState, original.__name__, update_and_check)


async def _run(spec: dict[str, Any]) -> None:
    from guidellm.benchmark import benchmark_generative_text
    from guidellm.schemas.benchmark import BenchmarkScenario

    scenario = BenchmarkScenario.create(None, spec=spec)
    await benchmark_generative_text(scenario, progress=False)


if __name__ == "__main__":
    main()
