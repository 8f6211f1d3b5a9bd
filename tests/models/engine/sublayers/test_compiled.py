"""Traced, joined and compiled parts against the functions they were made of; no engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sluice.models.engine.sublayers.compiled import Compiler
from sluice.models.engine.sublayers.functions import attend, run_mlp
from sluice.models.engine.sublayers.graphs import Tracer, UntraceableError, examples
from sluice.models.engine.sublayers.sublayers import SubLayers, compiled_sublayers, plain_sublayers

HIDDEN = 32
EXAMPLES = examples(HIDDEN, torch.float32, torch.device("cpu"))
PAIR = {name: EXAMPLES[name] for name in ("delta", "residual")}
ATTENDING = {**PAIR, "positions": EXAMPLES["positions"]}


class Norm(nn.Module):
    """As vLLM's norms: adds the pending output to the residual."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5, requires_grad=False)
        self.eps = eps

    def forward(
        self, delta: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = delta + residual
        scale = torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + self.eps)
        return residual * scale * self.weight, residual


class Attention(nn.Module):
    """Looks at its own row only: what other rows are in a call must not matter here."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        turned = torch.cos(positions.to(hidden_states.dtype))[:, None]
        output: torch.Tensor = self.projection(hidden_states) * turned
        return output


def layer(eps: float = 1e-5, width: int = 64) -> Any:
    mlp = nn.Sequential(nn.Linear(HIDDEN, width), nn.SiLU(), nn.Linear(width, HIDDEN))
    return SimpleNamespace(
        attention_norm=Norm(eps),
        attention=Attention(),
        mlp_norm=Norm(eps),
        mlp=mlp,
        fills_alone=False,
    )


@pytest.fixture(scope="module")
def both() -> tuple[SubLayers, SubLayers, Compiler]:
    """Three layers plain and compiled; the last one has a wider MLP."""
    torch.manual_seed(0)
    layers = [layer(), layer(), layer(width=96)]
    stack: Any = SimpleNamespace(layers=layers, final_norm=Norm(1e-5))
    compiler = Compiler({}, EXAMPLES)
    with torch.inference_mode():
        compiled = compiled_sublayers(stack, compiler)
    return plain_sublayers(stack), compiled, compiler


def state(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    delta, residual = torch.randn((2, rows, HIDDEN), generator=generator)
    return delta, residual, torch.arange(rows)


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 300])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_parts_are_what_they_were_made_of(
    both: tuple[SubLayers, SubLayers, Compiler], index: int, rows: int
) -> None:
    plain, compiled, _ = both
    delta, residual, positions = state(rows)
    some, others = torch.arange(rows)[:, None] % 2 == 0, torch.arange(rows)[:, None] % 3 == 0
    with torch.inference_mode():
        for keep, keep_mlp in ((None, None), (some, None), (None, others), (some, others)):
            for part in (
                lambda each, k=keep: each.attend[index](delta, residual, positions, k),
                lambda each, k=keep: each.run_mlp[index](delta, residual, k),
                lambda each, k=keep, m=keep_mlp: each.block[index](
                    delta, residual, positions, k, m
                ),
            ):
                torch.testing.assert_close(part(compiled), part(plain))
        norms = [each.final_norm(delta, residual)[0] for each in (compiled, plain)]
        torch.testing.assert_close(*norms)


def test_layers_of_one_kind_share_what_was_compiled(
    both: tuple[SubLayers, SubLayers, Compiler],
) -> None:
    # One attention and a final norm; an MLP and a block of either width.
    assert len(both[2]) == 6


def test_a_row_without_its_output_keeps_its_state_whatever_the_part_made_of_it(
    both: tuple[SubLayers, SubLayers, Compiler],
) -> None:
    delta, residual, positions = state(4)
    delta[2] = torch.nan  # As after an attention over K/V that nobody wrote.
    keep = torch.tensor([[True], [True], [False], [True]])
    with torch.inference_mode():
        for each in both[:2]:
            left, moved = each.attend[0](delta, residual, positions, keep)
            assert not left[2].any()
            assert not left.isnan().any()
            assert moved[2].isnan().all()


def test_layers_are_of_one_kind_if_their_code_and_sizes_are_the_same() -> None:
    layers = [layer(1e-5), layer(1e-5), layer(1e-3), layer(width=96)]
    kinds = [part.kind for part in Tracer(run_mlp, PAIR).trace(layers)]
    assert kinds[0] is kinds[1]
    assert len(set(kinds)) == 3


def test_the_weights_are_inputs_and_nothing_else_is() -> None:
    layers = [layer(), layer()]
    parts = Tracer(attend, ATTENDING).trace(layers)
    for part, each in zip(parts, layers, strict=True):
        owned = {id(value) for value in part.owned}
        weights = [each.attention_norm.weight, *each.attention.parameters()]
        assert owned == {id(weight) for weight in weights}


def test_a_part_that_keeps_something_to_itself_is_refused() -> None:
    class Branches(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            branches = (lambda x: x + 1.0, lambda x: x - 1.0)
            chosen: torch.Tensor = torch.cond(hidden.sum() > 0, *branches, (hidden,))
            return chosen

    bad = layer()
    bad.mlp = Branches()
    with pytest.raises(UntraceableError, match="get_attr"):
        Tracer(run_mlp, PAIR).trace([bad])
