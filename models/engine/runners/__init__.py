"""Thin adapters: vLLM's model runners with the routing core in front."""

from __future__ import annotations


def attached(stock: type, *, v2: bool) -> type:
    """A runner class of vLLM's with our adapter mixed in.

    Args:
        stock: the class.
        v2: it is a V2 runner, and not a V1 runner.
    """
    from sluice.models.engine.runners.v1 import RoutedV1Runner
    from sluice.models.engine.runners.v2 import RoutedV2Runner

    adapter = RoutedV2Runner if v2 else RoutedV1Runner
    return type(f"Routed{stock.__name__}", (adapter, stock), {})
