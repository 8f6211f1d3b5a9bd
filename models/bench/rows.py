"""What is measured. A new row is a new entry of `ROWS`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sluice.models.policy import SkipSet

PROMPT_TOKENS = 32
NEW_TOKENS = 48
PREFILL_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        name: what a reader sees.
        measure: `decode` counts tokens per second after the first; `prefill` the time to it.
        batch: requests sent together.
        routed: how many of them skip.
        blocks: share of blocks a routed request leaves out, spread evenly.
        bar: ratio to stock vLLM that the project promises, or None.
    """

    name: str
    measure: Literal["decode", "prefill"]
    batch: int
    routed: int
    blocks: float
    bar: float | None

    @property
    def prompt_tokens(self) -> int:
        """Prompt length of each request."""
        return PREFILL_TOKENS if self.measure == "prefill" else PROMPT_TOKENS

    @property
    def new_tokens(self) -> int:
        """Tokens each request generates."""
        return 1 if self.measure == "prefill" else NEW_TOKENS

    def skip(self, num_layers: int) -> SkipSet:
        """The routed requests' skip set: every other block from block 1 on for a half."""
        count = round(num_layers * self.blocks)
        return SkipSet.of(blocks=tuple(int((i + 0.5) * num_layers / count) for i in range(count)))

    @property
    def ideal(self) -> float:
        """Ratio if the time of a step were its rows' blocks and nothing else."""
        return 1 / (1 - self.blocks * self.routed / self.batch)


def _decode(batch: int, routed: int, blocks: float, name: str, bar: float | None) -> Row:
    return Row(f"decode, batch {batch}, {name}", "decode", batch, routed, blocks, bar)


ROWS: tuple[Row, ...] = (
    *(_decode(b, 0, 0.0, "no routing", 0.98) for b in (1, 8, 32)),
    *(
        _decode(b, b, 0.5, "all skip half of the blocks", bar)
        for b, bar in ((1, 1.8), (8, 1.7), (32, 1.7))
    ),
    *(_decode(b, b // 2, 0.5, "half skip half of the blocks", 0.98) for b in (8, 32)),
    Row("prefill, 512 tokens, no routing", "prefill", 1, 0, 0.0, 0.98),
    Row("prefill, 512 tokens, half of the blocks", "prefill", 1, 1, 0.5, 1.6),
    Row("prefill, 4 x 512 tokens, half of the blocks", "prefill", 4, 4, 0.5, 1.6),
)
