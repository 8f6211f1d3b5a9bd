"""Parts of layers compiled by Inductor, with the options that vLLM compiles the model with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from sluice.models.engine.sublayers.graphs import LayerPart, PartGraph, arguments_of, join

Compiled = Callable[..., tuple[torch.Tensor, ...]]
"""What `join` makes, compiled."""


class Everybody:
    """Masks that keep every row, (rows, 1), views of one tensor."""

    def __init__(self, like: torch.Tensor) -> None:
        self._all = torch.ones_like(like)

    def of(self, rows: int) -> torch.Tensor:
        """For so many rows."""
        if rows > len(self._all):
            self._all = self._all.new_ones((2 * rows, 1))
        return self._all[:rows]


class Launch:
    """A compiled function, and what its layers own."""

    __slots__ = ("_everybody", "_owned", "compiled")

    def __init__(self, compiled: Compiled, owned: tuple[Any, ...], everybody: Everybody) -> None:
        self.compiled = compiled
        self._owned = owned
        self._everybody = everybody

    def __call__(self, delta: torch.Tensor, *others: torch.Tensor | None) -> Any:
        """Run it on its arguments in order; a mask that is None keeps all rows."""
        filled = (self._everybody.of(len(delta)) if each is None else each for each in others)
        return self.compiled(delta, *filled, *self._owned)


class Compiler:
    """Compiles runs of parts; those whose parts are of equal kinds once."""

    def __init__(self, options: Mapping[str, Any], arguments: Mapping[str, torch.Tensor]) -> None:
        """Compile with `options` of Inductor for `arguments` like these, of any number of rows."""
        self.arguments = arguments
        self._options = dict(options)
        self._everybody = Everybody(arguments["keep_mlp"])
        self._compiled: dict[tuple[tuple[PartGraph, str | None], ...], Compiled] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def launch(self, parts: Sequence[tuple[LayerPart, str | None]]) -> Launch:
        """Parts in order as one function. `parts`: as `join` takes them, of one layer each."""
        kinds = tuple((part.kind, keep) for part, keep in parts)
        owned = tuple(each for part, _ in parts for each in part.owned)
        if kinds not in self._compiled:
            self._compiled[kinds] = self._compile(kinds, owned)
        return Launch(self._compiled[kinds], owned, self._everybody)

    def _compile(
        self, kinds: Sequence[tuple[PartGraph, str | None]], owned: Sequence[Any]
    ) -> Compiled:
        from torch._inductor.compile_fx import compile_fx

        mode = FakeTensorMode(shape_env=ShapeEnv())
        names = arguments_of(kinds)
        inputs = [_fake(mode, self.arguments[name], dynamic=True) for name in names]
        inputs += [_fake(mode, each, dynamic=False) for each in owned]
        with tracing(TracingContext(mode)):
            compiled: Any = compile_fx(join(kinds), inputs, config_patches=self._options)
        return cast(Compiled, compiled)


def _fake(mode: FakeTensorMode, value: Any, *, dynamic: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    sizes = [DimDynamic.STATIC] * value.dim()
    if dynamic:
        sizes[0] = DimDynamic.DYNAMIC
    return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
