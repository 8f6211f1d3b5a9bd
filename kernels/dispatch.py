"""Which implementation of an operation runs where.

Every operation has a plain PyTorch reference, which runs on any device. On a CPU a vectorised
implementation takes its place, on CUDA a Triton kernel, where there is one. `SLUICE_KERNELS` says
otherwise: `reference` for the plain one everywhere, `triton` for Triton on the CPU as well (through
its interpreter, with `TRITON_INTERPRET=1`: for tests).

An argument may be a dataclass, a group of tensors and numbers. Implementations get it whole; only
the custom operator, which PyTorch gives a flat signature, has its fields one by one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from inspect import Parameter, Signature, signature
from typing import Any, Generic, ParamSpec, TypeVar, get_type_hints

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


class FlatSignature:
    """The signature of an operation with the fields of its groups in place of the groups.

    Attributes:
        prototype: a function that has it, for PyTorch to read.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        """Read the annotations of an operation's reference."""
        read = signature(function, eval_str=True)
        self._groups: dict[str, tuple[Any, tuple[str, ...]] | None] = {}
        self._flat_names: dict[str, tuple[str, ...]] = {}
        parameters = []
        for name, parameter in read.parameters.items():
            kind = parameter.annotation
            if is_dataclass(kind):
                types = get_type_hints(kind)
                names = tuple(each.name for each in fields(kind))
                self._groups[name] = kind, names
                flat = {f"{name}_{each}": types[each] for each in names}
            else:
                self._groups[name] = None
                flat = {name: kind}
            self._flat_names[name] = tuple(flat)
            parameters += [
                Parameter(each, Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
                for each, annotation in flat.items()
            ]

        def prototype() -> None:
            """Only its signature matters."""

        flattened = Signature(parameters, return_annotation=read.return_annotation)
        prototype.__signature__ = flattened  # type: ignore[attr-defined]
        self.prototype = prototype

    def names(self, arguments: Sequence[str]) -> list[str]:
        """Flat names of some of the operation's arguments."""
        return [flat for name in arguments for flat in self._flat_names[name]]

    def flatten(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Arguments of the custom operator, from those of the operation."""
        given = dict(zip(self._groups, args, strict=False)) | kwargs
        flat: list[Any] = []
        for name, group in self._groups.items():
            value = given[name]
            flat += [value] if group is None else [getattr(value, each) for each in group[1]]
        return flat

    def unflatten(self, flat: Sequence[Any]) -> Iterator[Any]:
        """Inverse of `flatten`."""
        values = iter(flat)
        for group in self._groups.values():
            if group is None:
                yield next(values)
            else:
                kind, names = group
                yield kind(*(next(values) for _ in names))


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
        self.flat = FlatSignature(reference)
        self._sources = {"cpu": cpu, "cuda": triton}
        self._implementations: dict[tuple[str, str], Callable[P, R]] = {}
        flat, run = self.flat, self._run

        def run_flat(*args: Any) -> R:
            return run(*flat.unflatten(args))  # type: ignore[call-arg]

        def fake_flat(*args: Any) -> R:
            return fake(*flat.unflatten(args))  # type: ignore[call-arg]

        schema = torch.library.infer_schema(flat.prototype, mutates_args=flat.names(mutates))
        _LIBRARY.define(self.name + schema)
        _LIBRARY.impl(self.name, run_flat, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sluice::{self.name}", fake_flat, lib=_LIBRARY)
        self.op: Any = getattr(torch.ops.sluice, self.name)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it; a keyword argument costs a compiled graph nothing, an eager call a little."""
        if torch.compiler.is_compiling():
            result: R = self.op(*self.flat.flatten(*args, **kwargs))
            return result
        return self._run(*args, **kwargs)

    def implementation(self, device: str, choice: str) -> Callable[P, R]:
        """What runs on a device type under one of `CHOICES`."""
        source = None
        if choice != REFERENCE:
            source = self._sources["cuda" if choice == TRITON else device]
        if source is None:
            return self.reference
        module, _, name = source.partition(":")
        function: Callable[P, R] = getattr(import_module(module), name)
        return function

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
