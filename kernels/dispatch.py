"""Which implementation of an operation runs where.

Every operation has a plain PyTorch reference, which runs on any device. On a CPU a vectorised
implementation takes its place, on CUDA a Triton kernel, where there is one. `SLUICE_KERNELS` says
otherwise: `reference` for the plain one everywhere, `triton` for Triton on the CPU as well (through
its interpreter, with `TRITON_INTERPRET=1`: for tests).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, Generic, ParamSpec, TypeVar

import torch

VARIABLE = "SLUICE_KERNELS"
AUTO, REFERENCE, TRITON = "auto", "reference", "triton"
CHOICES = (AUTO, REFERENCE, TRITON)

P = ParamSpec("P")
R = TypeVar("R")

# PyTorch keeps operators by name for the whole process.
_LIBRARY: Any = torch.library.Library("sluice", "DEF")  # type: ignore[no-untyped-call]


class KernelChoiceError(ValueError):
    """`SLUICE_KERNELS` names no choice; the message says which there are."""


@cache
def chosen() -> str:
    """What `SLUICE_KERNELS` asks for, read once.

    Raises:
        KernelChoiceError: it is none of `CHOICES`.
    """
    value = os.environ.get(VARIABLE, AUTO)
    if value not in CHOICES:
        raise KernelChoiceError(f"{VARIABLE}={value!r}: must be one of {', '.join(CHOICES)}")
    return value


class Operation(Generic[P, R]):
    """One operation; calling it runs the implementation for the first argument's device.

    It is also the custom operator `torch.ops.sluice.<name>`, which is what a compiled graph holds.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        *,
        fake: Callable[P, R],
        mutates: Sequence[str] = (),
        cpu: str | None = None,
        triton: str | None = None,
    ) -> None:
        """Register it.

        Args:
            reference: the plain PyTorch function; first argument a tensor.
            fake: the same on tensors without data: shapes and dtypes only.
            mutates: arguments that are written to.
            cpu: `module:function` of the CPU's implementation; imported when it first runs.
            triton: the same of the Triton launcher.
        """
        self.name = reference.__name__
        self.reference = reference
        self._places = {"cpu": cpu, "cuda": triton}
        self._implementations: dict[tuple[str, str], Callable[P, R]] = {}
        schema = torch.library.infer_schema(reference, mutates_args=mutates)
        _LIBRARY.define(self.name + schema)
        _LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sluice::{self.name}", fake, lib=_LIBRARY)
        self.op: Any = getattr(torch.ops.sluice, self.name)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it; a keyword argument costs a compiled graph nothing, an eager call a little."""
        if torch.compiler.is_compiling():
            result: R = self.op(*args, **kwargs)
            return result
        return self._run(*args, **kwargs)

    def implementation(self, device: str, choice: str) -> Callable[P, R]:
        """What runs on a device type under one of `CHOICES`."""
        place = None
        if choice != REFERENCE:
            place = self._places["cuda" if choice == TRITON else device]
        if place is None:
            return self.reference
        module, _, function = place.partition(":")
        found: Callable[P, R] = getattr(import_module(module), function)
        return found

    def _run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        key = (first.device.type, chosen())
        run = self._implementations.get(key)
        if run is None:
            run = self._implementations[key] = self.implementation(*key)
        return run(*args, **kwargs)


def operation(
    *,
    fake: Callable[P, R],
    mutates: Sequence[str] = (),
    cpu: str | None = None,
    triton: str | None = None,
) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Make a plain PyTorch function an operation; see `Operation`."""
    return lambda reference: Operation(
        reference, fake=fake, mutates=mutates, cpu=cpu, triton=triton
    )
