"""When, where and with which versions something was measured."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """As JSON values: `date` (UTC), `machine` and `versions`."""
    import torch
    import vllm

    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.date().isoformat(),
        "machine": machine(),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
    }


def machine() -> str:
    """Processor, cores that this process may use, and memory."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0))
    return f"{_processor()}, {cores} cores, {pages * size / 1024**3:.0f} GiB"


def _processor() -> str:
    """Its name from the kernel, or its architecture where there is none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
