"""One operation at one size: how it is called, what it moves, what its results must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sluice.kernels.bench.agreement import Agreement, Outputs, tensors, within
from sluice.kernels.dispatch import Operation
from sluice.kernels.ops.routing_args import TensorGroup

Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Bound:
    """A function with arguments of its own.

    Attributes:
        call: runs it; what times are taken of.
        written: those of its arguments that it writes to.
    """

    call: Call
    written: tuple[torch.Tensor, ...] = ()

    def outputs(self) -> Outputs:
        """Run it once; what it returns, then a copy of what it has written to."""
        returned = tensors(self.call())
        return (*returned, *(tensor.clone() for tensor in self.written))


@dataclass(frozen=True, slots=True)
class Counterpart:
    """What stock vLLM or PyTorch runs at equal function.

    Attributes:
        name: what a reader sees.
        call: runs it; returns what `agreement` compares with the reference's outputs.
        agreement: how; None is the case's own.
    """

    name: str
    call: Call
    agreement: Agreement | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one size.

    Attributes:
        operation: what is measured.
        rows: of this size.
        args: of a call.
        moved: bytes by definition: each input read once, each output written once.
        setting: which of the operation's uses this is, or nothing.
        mutated: indices of the arguments that it writes to.
        agreement: how results are compared.
        counterparts: what it is compared with beside the reference; may be none.
    """

    operation: Operation[..., Any]
    rows: int
    args: tuple[Any, ...]
    moved: int
    setting: str = ""
    mutated: tuple[int, ...] = ()
    agreement: Agreement = field(default_factory=within)
    counterparts: tuple[Counterpart, ...] = ()

    @property
    def name(self) -> str:
        """What a reader sees."""
        return self.operation.name + (f", {self.setting}" if self.setting else "")

    def bound(self, function: Callable[..., Any]) -> Bound:
        """An implementation with its own copy of what it writes to."""
        args = [
            _copied(arg) if index in self.mutated else arg for index, arg in enumerate(self.args)
        ]
        written = [tensor for index in self.mutated for tensor in tensors(args[index])]
        return Bound(lambda: function(*args), tuple(written))


def nbytes(*parts: torch.Tensor | TensorGroup | Sequence[torch.Tensor]) -> int:
    """Bytes of tensors, or of groups of them."""
    return sum(tensor.numel() * tensor.itemsize for part in parts for tensor in tensors(part))


def _copied(arg: torch.Tensor | TensorGroup) -> Any:
    if isinstance(arg, torch.Tensor):
        return arg.clone()
    group: Any = type(arg)
    return group(*(tensor.clone() for tensor in arg.tensors))
