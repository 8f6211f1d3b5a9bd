"""Whether two results are the same: what is wrong is not timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sluice.kernels.ops.router_config import ROWS
from sluice.kernels.ops.routing_args import TensorGroup

Outputs = tuple[torch.Tensor, ...]
"""What an operation returns, then what it has written to."""

Agreement = Callable[[Outputs, Outputs], None]
"""Compares a result, which may be less than all of it, with the reference's.

It raises `MismatchError` where they differ.
"""

TOLERANCE = 1e-5


class MismatchError(ValueError):
    """A result differs from the reference's; the message says where and by how much."""


def within(*tolerances: float) -> Agreement:
    """Compare floats to a tolerance each, absolute and relative; all else must be equal.

    Args:
        tolerances: of the outputs in order; outputs beyond the last have `TOLERANCE`.
    """

    def agreement(result: Outputs, expected: Outputs) -> None:
        if not result:
            raise MismatchError("no output")
        for index, (one, other) in enumerate(zip(result, expected, strict=False)):
            tolerance = tolerances[index] if index < len(tolerances) else TOLERANCE
            assert_same(f"output {index}", one, other, tolerance)
        if len(result) > len(expected):
            raise MismatchError(f"{len(result)} outputs for {len(expected)}")

    return agreement


def assert_same(
    name: str, result: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE
) -> None:
    """Hold one tensor against another; equal infinities are equal, NaN equals nothing.

    Raises:
        MismatchError: they differ in shape, dtype or a number.
    """
    if result.shape != expected.shape or result.dtype != expected.dtype:
        kinds = [f"{tuple(part.shape)} {part.dtype}" for part in (result, expected)]
        raise MismatchError(f"{name}: {kinds[0]} for {kinds[1]}")
    if result.is_floating_point():
        if bool(result.isnan().any()) or bool(expected.isnan().any()):
            raise MismatchError(f"{name}: NaN")
        same = torch.isclose(result, expected, rtol=tolerance, atol=tolerance)
    else:
        same = result == expected
    wrong = int((~same).sum())
    if wrong:
        apart = (result.double() - expected.double()).abs()[~same].max()
        raise MismatchError(
            f"{name}: {wrong} of {same.numel()} differ, by up to {float(apart):.3g}"
        )


def routes(choice: torch.Tensor, *, tie: float = 1e-6, most_tied: float = 0.05) -> Agreement:
    """Compare weights, ids and counts of routed rows, whatever the order of their slots.

    Experts must be equal in rows without a tie, weights to `TOLERANCE`, counts as far as ties
    leave them no choice.

    Args:
        choice: fp32, (rows, experts): what the rows select by; counts by token have as many rows.
        tie: relative distance of two scores under which a row may select either.
        most_tied: share of rows that may have ties; with more the comparison would say nothing.
    """
    ranked = choice.sort(dim=-1, descending=True).values
    near = ranked[:, :-1] - ranked[:, 1:] <= tie * ranked[:, 1:].abs()
    clear = ~(near & ranked[:, 1:].isfinite()).any(-1)

    def agreement(result: Outputs, expected: Outputs) -> None:
        if float(clear.float().mean()) < 1.0 - most_tied:
            raise MismatchError(f"{int((~clear).sum())} of {len(clear)} rows have ties")
        if len(result) < 2:
            raise MismatchError("weights or ids are missing")
        experts = choice.shape[1]
        one, other = (_dense(each[0], each[1], experts) for each in (result, expected))
        assert_same("experts", (one != 0)[clear], (other != 0)[clear])
        assert_same("weights", one[clear], other[clear])
        for name, counted, wanted in zip(
            ("histogram", "by_token"), result[2:], expected[2:], strict=False
        ):
            if bool(clear.all()):
                assert_same(name, counted, wanted)
            elif name == "by_token":
                assert_same(name, counted[clear], wanted[clear])
            else:
                assert_same(f"{name}, rows", counted[:, ROWS], wanted[:, ROWS])

    return agreement


def _dense(weights: torch.Tensor, ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Weights by expert, fp32, (rows, experts); unused slots weigh nothing."""
    if weights.shape != ids.shape or weights.dtype != torch.float32 or ids.dtype != torch.int32:
        raise MismatchError(f"weights {tuple(weights.shape)} {weights.dtype}, ids {ids.dtype}")
    if bool(weights.isnan().any()):
        raise MismatchError("weights: NaN")
    used = weights != 0
    if bool((used & ((ids < 0) | (ids >= experts))).any()):
        raise MismatchError("ids: a weight without an expert")
    slots = ids.long().clamp(0, experts - 1)
    blank = torch.zeros((len(ids), experts), device=ids.device)
    if bool((blank.clone().scatter_add_(1, slots, used.float()) > 1).any()):
        raise MismatchError("ids: an expert runs twice")
    return blank.scatter_add_(1, slots, weights)


def tensors(result: torch.Tensor | TensorGroup | Sequence[torch.Tensor] | None) -> Outputs:
    """What a call gave or was given, flat."""
    if result is None:
        return ()
    if isinstance(result, TensorGroup):
        return result.tensors
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)
