"""Checks the implementations of a case, then times those that are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sluice.kernels.bench.agreement import Agreement, MismatchError, Outputs
from sluice.kernels.bench.cases.case import Bound, Call, Case
from sluice.kernels.bench.clock import Clock, Sample, interleaved
from sluice.kernels.dispatch import AUTO

REFERENCE, OURS, COPY = "reference", "ours", "copy"
"""Names of what is timed beside the counterparts: the plain PyTorch function, what the device gets
in its place, and a plain copy that moves as many bytes."""


@dataclass(frozen=True, slots=True)
class Result:
    """One case, measured.

    Attributes:
        name: of the operation and its setting.
        rows: of this size.
        moved: bytes by definition.
        implementation: what the device gets, `module:function`.
        seconds: by name: `REFERENCE`, `OURS` where the device gets something else, `COPY`, and
            each counterpart's own.
        wrong: by name, what was not timed because its results are not the reference's, and why.
    """

    name: str
    rows: int
    moved: int
    implementation: str
    seconds: dict[str, Sample]
    wrong: dict[str, str]

    @property
    def ours(self) -> Sample | None:
        """Seconds of what the device gets; None if that is wrong."""
        return None if OURS in self.wrong else self.seconds.get(OURS, self.seconds[REFERENCE])

    @property
    def counterparts(self) -> tuple[str, ...]:
        """Names of those that were timed."""
        return tuple(name for name in self.seconds if name not in (REFERENCE, OURS, COPY))

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second; None if what the device gets is wrong."""
        return None if self.ours is None else self.moved / self.ours.median

    def share(self, copy_bandwidth: float) -> float | None:
        """Of a plain copy's bytes per second."""
        return None if self.bandwidth is None else self.bandwidth / copy_bandwidth

    def gain(self, name: str) -> Sample | None:
        """How many times longer something else takes; None if what the device gets is wrong."""
        return None if self.ours is None else self.seconds[name].over(self.ours)


def measure(
    case: Case, clock: Clock, repeats: int, device: torch.device, ours: Callable[..., Any]
) -> Result:
    """Check and time one case.

    Args:
        case: what.
        clock: of the device.
        repeats: times of each implementation.
        device: where the case's arguments are.
        ours: what the device gets.
    """
    reference = case.bound(case.operation.reference)
    wanted = reference.outputs()
    calls: dict[str, Call] = {REFERENCE: reference.call}
    wrong: dict[str, str] = {}

    def add(name: str, bound: Bound, agreement: Agreement) -> None:
        fault = _fault(bound, wanted, agreement)
        if fault is None:
            calls[name] = bound.call
        else:
            wrong[name] = fault

    if ours is not case.operation.reference:
        add(OURS, case.bound(ours), _whole(case.agreement))
    for other in case.counterparts:
        add(other.name, Bound(other.call), other.agreement or case.agreement)
    calls[COPY] = _copy(case.moved, device)
    times = interleaved(calls, repeats, clock)
    return Result(
        case.name,
        case.rows,
        case.moved,
        f"{ours.__module__}:{ours.__qualname__}",
        {name: Sample(tuple(seconds)) for name, seconds in times.items()},
        wrong,
    )


def served(case: Case, device: torch.device) -> Callable[..., Any]:
    """What a device gets for a case's operation."""
    function: Callable[..., Any] = case.operation.implementation(device.type, AUTO)
    return function


def _fault(bound: Bound, wanted: Outputs, agreement: Agreement) -> str | None:
    """Why a result is wrong; None if it is right.

    Args:
        bound: what is checked.
        wanted: outputs of the reference.
        agreement: how they are compared.
    """
    try:
        agreement(bound.outputs(), wanted)
    except MismatchError as error:
        return str(error)
    except Exception as error:
        # Whatever it is, it is this implementation's; the rest of the table stands without it.
        return f"{type(error).__name__}: {error}"
    return None


def _whole(agreement: Agreement) -> Agreement:
    """The same for an implementation of ours, of which all outputs must be there."""

    def whole(result: Outputs, expected: Outputs) -> None:
        if len(result) != len(expected):
            raise MismatchError(f"{len(result)} outputs for {len(expected)}")
        agreement(result, expected)

    return whole


def _copy(moved: int, device: torch.device) -> Call:
    source = torch.ones(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)
