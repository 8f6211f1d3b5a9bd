"""Parts of layers compiled by Inductor, with the options that vLLM compiles the model with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from sluice.models.engine.sublayers.graphs import ARGUMENTS, LayerPart, PartGraph, join

Compiled = Callable[..., tuple[torch.Tensor, ...]]
"""Of `ARGUMENTS` and of what the layers own; gives the pair and what writes K/V alone returns."""


class Launch:
    """A compiled function, and what its layers own."""

    __slots__ = ("_compiled", "_owned")

    def __init__(self, compiled: Compiled, owned: tuple[Any, ...]) -> None:
        self._compiled = compiled
        self._owned = owned

    def __call__(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run it. `arguments`: see `ARGUMENTS`."""
        return self._compiled(*arguments, *self._owned)


class Compiler:
    """Compiles runs of parts; those whose parts are of equal kinds once."""

    def __init__(self, options: Mapping[str, Any], arguments: Mapping[str, torch.Tensor]) -> None:
        """Compile with `options` of Inductor for `arguments` like these, of any number of rows."""
        self._options = dict(options)
        self._arguments = arguments
        self._compiled: dict[tuple[tuple[PartGraph, str | None], ...], Compiled] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def launch(self, parts: Sequence[tuple[LayerPart, str | None]]) -> Launch:
        """Parts in order as one function. `parts`: as `join` takes them, of one layer each."""
        kinds = tuple((part.kind, keep) for part, keep in parts)
        owned = tuple(each for part, _ in parts for each in part.owned)
        if kinds not in self._compiled:
            self._compiled[kinds] = self._compile(kinds, owned)
        return Launch(self._compiled[kinds], owned)

    def _compile(
        self, kinds: Sequence[tuple[PartGraph, str | None]], owned: Sequence[Any]
    ) -> Compiled:
        from torch._inductor.compile_fx import compile_fx

        mode = FakeTensorMode(shape_env=ShapeEnv())
        inputs = [_fake(mode, self._arguments[name], dynamic=True) for name in ARGUMENTS]
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
