"""Which implementation runs, and that a compiled graph can hold every operation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.references.routes import Asked
from support.routings import Pull, Routing, policy_table

from sluice.kernels import dispatch
from sluice.kernels.dispatch import (
    AUTO,
    CHOICES,
    REFERENCE,
    TRITON,
    VARIABLE,
    KernelChoiceError,
    Operation,
)
from sluice.kernels.ops.batch_budget import XSHARE, batch_budget
from sluice.kernels.ops.route_topk import count_selections, route_topk
from sluice.kernels.ops.router_scores import router_scores
from sluice.kernels.ops.routing_args import (
    RouteRows,
    RouterSpec,
    Selection,
    SelectionCounts,
    Shared,
    TensorGroup,
)

EXPERTS = 7
SPEC = RouterSpec(2)


def integers(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def arguments() -> dict[str, tuple[Operation, tuple]]:
    """Every routing operation with what a step would give it."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, EXPERTS, generator=generator)
    asked = [Asked(top_k=3), Asked(masked={1})]
    table = policy_table(asked, (), SPEC, EXPERTS)
    rows = RouteRows(
        integers(1, 0, 2), integers(0, 1, 2, dtype=torch.int64), integers(-1, -1, 0),
        integers(0, -1, -1),
    )  # fmt: skip
    within = torch.tensor([[True] * 6 + [False]])
    shared = Shared(
        torch.rand(1, EXPERTS, generator=generator), torch.tensor([0.5]), integers(4), within
    )
    counts = SelectionCounts(
        torch.zeros((2, EXPERTS + 2), dtype=torch.int64), torch.zeros((3, 3), dtype=torch.int64)
    )
    stock = Selection(torch.ones(3, 2), integers(0, 1, 0, 1, 0, 1).view(3, 2))
    router = replace(SPEC, correction=torch.zeros(EXPERTS))
    groups = (rows, shared, table, router)
    scores = logits.softmax(-1)
    # On a CPU the width that comes back is data, as no graph can know: a row uses all of it here.
    return {
        "route_topk": (route_topk, (logits, *groups, stock, counts, 1, 3, True)),
        "router_scores": (router_scores, (logits, *groups)),
        "count_selections": (count_selections, (stock.ids, rows.token_index, counts, 0)),
        "batch_budget": (batch_budget, (scores, scores, XSHARE, 4)),
    }


@pytest.mark.parametrize("name", sorted(arguments()))
def test_a_graph_can_hold_it(name: str) -> None:
    operation, args = arguments()[name]
    torch.library.opcheck(operation.op.default, tuple(operation.flat.flatten(*args)))


@pytest.mark.parametrize("name", sorted(arguments()))
def test_a_compiled_call_is_the_eager_one(name: str) -> None:
    operation, args = arguments()[name]
    _, same = arguments()[name]
    eager = operation(*args)
    compiled = torch.compile(operation.__call__, fullgraph=True, backend="aot_eager")(*same)
    for one, other in zip(flat(eager), flat(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    for one, other in zip(flat(args), flat(same), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def flat(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, TensorGroup):
        return list(value.tensors)
    if isinstance(value, list | tuple):
        return [each for part in value for each in flat(part)]
    return []


@pytest.mark.parametrize("choice", CHOICES)
def test_the_variable_chooses(choosing: pytest.MonkeyPatch, choice: str) -> None:
    choosing.setenv(VARIABLE, choice)
    run: list[str] = []

    def implementation(device: str, kind: str) -> object:
        return lambda *args: run.append(f"{device} {kind}")

    choosing.setattr(NOOP, "implementation", implementation)
    NOOP(torch.zeros(1))
    assert run == [f"cpu {choice}"]


def noop(tensor: torch.Tensor) -> None:
    return None


NOOP = Operation(noop, fake=noop)


def test_implementations_of_each_choice() -> None:
    assert route_topk.implementation("cpu", REFERENCE) is route_topk.reference
    assert route_topk.implementation("cuda", REFERENCE) is route_topk.reference
    assert route_topk.implementation("cpu", AUTO).__module__ == "sluice.kernels.cpu.route_topk"
    for device, choice in (("cuda", AUTO), ("cuda", TRITON), ("cpu", TRITON)):
        found = route_topk.implementation(device, choice)
        assert found.__module__ == "sluice.kernels.triton.route_topk"
    # Nothing better is known there.
    assert count_selections.implementation("cuda", AUTO) is count_selections.reference


def test_unset_is_auto(choosing: pytest.MonkeyPatch) -> None:
    choosing.delenv(VARIABLE, raising=False)
    assert dispatch.chosen() == AUTO


def test_an_unknown_choice_is_refused(choosing: pytest.MonkeyPatch) -> None:
    choosing.setenv(VARIABLE, "fastest")
    with pytest.raises(KernelChoiceError, match=r"SLUICE_KERNELS='fastest': must be one of auto"):
        dispatch.chosen()


def test_a_re_mix_and_a_plain_row_side_by_side() -> None:
    """The same routing through the operator and through its implementations."""
    logits = torch.randn(2, EXPERTS, generator=torch.Generator().manual_seed(2))
    pull = Pull(tuple([1.0] + [0.0] * (EXPERTS - 1)), 0.0, EXPERTS)
    routing = Routing(SPEC, logits, (Asked(), Asked()), (None, pull))
    for choice in CHOICES:
        assert set(routing.selected(choice).ids[1, :1].tolist()) == {0}
