"""Fixed exit: the nested sub-network of the first layers.

Source: SortedNet (arXiv 2309.00255), whose sub-models share a prefix of the depth and the head, and
LayerSkip (arXiv 2404.16710), early exit at one layer for all tokens. Nothing is decided while the
model runs, so it is a skip set of every block behind the exit layer, and needs no K/V there.
"""

from __future__ import annotations

from sluice.models.depth.method import StaticExit


class Fixed(StaticExit):
    """Every token leaves after one layer."""

    name = "fixed"
    description = "after one layer, for every token"
    source = "SortedNet (arXiv 2309.00255), LayerSkip (arXiv 2404.16710)"
    parameters = {}

    def skipped_blocks(self, layer: int, num_layers: int) -> tuple[int, ...]:
        """Every block behind the layer."""
        return tuple(range(layer + 1, num_layers))
