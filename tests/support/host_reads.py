"""A mode in which nothing may be read back from a device: what a CUDA graph cannot hold."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
"""What the host has to wait for."""


class HostReadError(AssertionError):
    """Something was read back."""


class no_host_reads(TorchDispatchMode):
    """Refuses operations whose answer the host needs."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.name().split(".")[0] in READS:
            raise HostReadError(function.name())
        return function(*args, **(kwargs or {}))
