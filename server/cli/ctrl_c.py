"""Ctrl-C while a server starts: it reaches this process alone, which ends the others."""

from __future__ import annotations

import signal
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from sluice.server.cli.parser import STOPPED_STATUS


def handle_ctrl_c() -> None:
    """Have Ctrl-C raise `SystemExit` once; a second one would cut the clean-up short.

    Not `KeyboardInterrupt`: vLLM swallows that while it waits for an engine.

    A terminal sends it to every process of the server. Those that still load vLLM would each die
    with a traceback, before this one can end them. So processes start with the signal blocked.
    """
    signal.signal(signal.SIGINT, _interrupt)
    start = BaseProcess.start

    def start_without_ctrl_c(process: BaseProcess) -> None:
        # It unblocks the signal when it starts.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            start(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    BaseProcess.start = start_without_ctrl_c  # type: ignore[assignment, method-assign]


def _interrupt(*_: Any) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit(STOPPED_STATUS)
