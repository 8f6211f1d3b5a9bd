"""Parts of layers as graphs of tensor operations, and several of them joined to one graph.

Dynamo traces a part of a layer. Whatever the part reads, weights and names of K/V caches too, is an
input of its graph. For the next layer Dynamo's guards say whether the graph is its graph as well;
then only the inputs differ. So one compiled function serves all layers of a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import fx

ARGUMENTS = ("delta", "residual", "positions", "keep_attention", "keep_mlp")
"""What a joined graph may be called with, before what its layers own.

`delta`, `residual`: the pair, (rows, hidden) each. `positions`: (rows,), int64. The others: whose
output stays, (rows, 1), bool.
"""

_ROWS = 16
"""Rows of the examples; the number of rows is a symbol in every graph."""
_NUMBER_OF_ROWS = "rows"
_KINDS = 64
"""Kinds of layers that a model may have; Dynamo's own limit is lower."""


class UntraceableError(RuntimeError):
    """A part of a layer is no pure graph of its inputs; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class PartGraph:
    """A part of a layer, for all layers of a kind.

    Attributes:
        graph: what it computes, as Dynamo wrote it down.
        takes: arguments of the function that was traced.
        inputs: of the graph, in order: which argument each is, or None if the layer owns it.
    """

    graph: fx.Graph
    takes: tuple[str, ...]
    inputs: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class LayerPart:
    """A part of one layer.

    Attributes:
        kind: its graph.
        owned: the graph's other inputs: weights, and the names of the layer.
    """

    kind: PartGraph
    owned: tuple[Any, ...]


class _Traced(Exception):
    """Ends a call after its inputs were seen; never escapes this file."""


def examples(hidden_size: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """A tensor for each of `ARGUMENTS`, of a few rows."""
    state = torch.zeros((_ROWS, hidden_size), dtype=dtype, device=device)
    positions = torch.zeros(_ROWS, dtype=torch.int64, device=device)
    keep = torch.ones((_ROWS, 1), dtype=torch.bool, device=device)
    values = (state, state.clone(), positions, keep, keep.clone())
    return dict(zip(ARGUMENTS, values, strict=True))


class Tracer:
    """Traces one function of a layer and some of `ARGUMENTS`."""

    def __init__(self, function: Callable[..., Any], arguments: Mapping[str, torch.Tensor]) -> None:
        """Trace `function(layer, **arguments)`; `arguments` are of `examples`, in its order."""
        assert isinstance(function, FunctionType)
        for tensor in arguments.values():
            torch._dynamo.mark_dynamic(tensor, 0)
        self._arguments = arguments
        self._latest: LayerPart | None = None
        # Dynamo keeps its graphs with the code: what others compiled of it must not be found here.
        copy = FunctionType(function.__code__.replace(), function.__globals__)
        self._function = torch.compile(
            copy,
            fullgraph=True,
            dynamic=False,
            backend=self._keep,
            options={"guard_filter_fn": _all_but_names},
        )

    def trace(self, layers: Sequence[Any]) -> list[LayerPart]:
        """The part of each layer.

        Raises:
            UntraceableError: a graph has a part that is no input, or takes one layer for another.
        """
        parts = [self._trace(layer) for layer in layers]
        names = [
            each for part in parts for each in part.owned if not isinstance(each, torch.Tensor)
        ]
        if len(set(names)) < len(names):
            raise UntraceableError("two layers have the same name in their graphs")
        return parts

    def _trace(self, layer: Any) -> LayerPart:
        self._latest = None
        limit = torch._dynamo.config.patch(recompile_limit=_KINDS)
        with suppress(_Traced), limit:
            self._function(layer, *self._arguments.values())
        assert self._latest is not None
        for node in self._latest.kind.graph.nodes:
            if node.op in ("get_attr", "call_module"):
                raise UntraceableError(f"{node.op} of {node.target} in a part of a layer")
        return self._latest

    def _keep(self, module: fx.GraphModule, _examples: Sequence[Any]) -> Callable[..., Any]:
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        inputs = tuple(_argument(node.meta["grapharg"]) for node in placeholders)
        kind = PartGraph(module.graph, tuple(self._arguments), inputs)

        def stop(*values: Any) -> None:
            pairs = zip(kind.inputs, values, strict=True)
            self._latest = LayerPart(kind, tuple(value for name, value in pairs if name is None))
            raise _Traced

        return stop


def _all_but_names(guards: Sequence[Any]) -> list[bool]:
    """Layers of one kind differ in their names, which are inputs of the graph."""
    return [not guard.name.endswith("layer_name") for guard in guards]


def _argument(graph_input: Any) -> str | None:
    if isinstance(graph_input.example, torch.SymInt):
        return _NUMBER_OF_ROWS
    name = getattr(graph_input.source, "local_name", None)
    return name if name in ARGUMENTS else None


def arguments_of(parts: Sequence[tuple[PartGraph, str | None]]) -> tuple[str, ...]:
    """What `join` makes of `parts` takes of `ARGUMENTS`, in their order."""
    taken = {name for part, keep in parts for name in (*part.takes, keep)}
    return tuple(name for name in ARGUMENTS if name in taken)


def join(parts: Sequence[tuple[PartGraph, str | None]]) -> fx.GraphModule:
    """One graph that runs parts in order: a function of `arguments_of` and of what the layers own.

    Args:
        parts: each with the argument that says which rows keep its output: the next part gets
            their new pair. The other rows leave with a `delta` of 0, which their state goes through
            unchanged. None leaves the pair as it is.

    Returns:
        The graph; it returns the pair if a part changes it, and then what the others returned.
    """
    graph = fx.Graph()
    arguments = {name: graph.placeholder(name) for name in arguments_of(parts)}
    inputs: list[list[fx.Node | None]] = []
    for number, (part, _) in enumerate(parts):
        inputs.append(
            [
                graph.placeholder(f"owned_{number}_{place}") if name is None else None
                for place, name in enumerate(part.inputs)
            ]
        )
    arguments[_NUMBER_OF_ROWS] = graph.call_method("size", (arguments["delta"], 0))
    others: list[Any] = []
    for (part, keep), owned in zip(parts, inputs, strict=True):
        placeholders = [node for node in part.graph.nodes if node.op == "placeholder"]
        values: dict[fx.Node, Any] = {
            node: arguments[name] if name is not None else value
            for node, name, value in zip(placeholders, part.inputs, owned, strict=True)
        }
        outputs: Any = graph.graph_copy(part.graph, values)
        if keep is None:
            others += outputs
        else:
            delta, residual = outputs
            # Not a product: what an attention made of K/V that nobody wrote may be NaN.
            kept = graph.call_function(torch.where, (arguments[keep], delta, 0))
            arguments |= {"delta": kept, "residual": residual}
    changes = any(keep is not None for _, keep in parts)
    pair = (arguments["delta"], arguments["residual"]) if changes else ()
    graph.output((*pair, *others))
    return fx.GraphModule({}, graph)
