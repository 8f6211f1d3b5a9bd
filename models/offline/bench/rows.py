"""What is measured on the dense model. A new row is a new entry of `depth_rows()`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sluice.models.offline.bench.model import LAYERS, BenchModel
from sluice.models.offline.bench.plans import RecordedPlans
from sluice.models.policy.policy import ExitRule, MissingKV, Phase, RoutingPolicy, SkipSet

PROMPT_TOKENS = 32
NEW_TOKENS = 48
PREFILL_TOKENS = 512
LONG_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        name: what a reader sees.
        policies: of the batch's requests, in order; None is a request without routing.
        bar: ratio to stock vLLM that the project promises, or None.
        ideal: ratio if a step were its rows' layers and nothing else, or None if not known.
        measure: `decode` counts tokens per second after the first, `prefill` the time to it,
            `batch` all the time.
        prompt_tokens: length of each prompt.
        same_prompts: every repeat has the same prompts, so that the prefix cache has them.
        model: what it is measured on.
    """

    name: str
    policies: tuple[RoutingPolicy | None, ...]
    bar: float | None = None
    ideal: float | None = 1.0
    measure: Literal["decode", "prefill", "batch"] = "decode"
    prompt_tokens: int = PROMPT_TOKENS
    same_prompts: bool = False
    model: BenchModel = BenchModel.DENSE

    @property
    def new_tokens(self) -> int:
        """Tokens each request generates."""
        return 1 if self.measure == "prefill" else NEW_TOKENS


def depth_rows(plans: RecordedPlans) -> tuple[Row, ...]:
    """The rows of the dense model; `plans` are replayed."""
    none = [Row(f"decode, batch {b}, no routing", (None,) * b, 0.98) for b in (1, 8, 32)]
    half = half_of_the_blocks()
    all_skip = [
        Row(f"decode, batch {b}, all skip half of the blocks", (half,) * b, bar, 2.0)
        for b, bar in ((1, 1.8), (8, 1.7), (32, 1.7))
    ]
    mixed = [
        Row(
            f"decode, batch {batch}, {skipping} skip half of the blocks",
            alternating(half, skipping, batch),
            0.98,
            1 / (1 - 0.5 * skipping / batch),
        )
        for batch, skipping in ((8, 1), (8, 4), (32, 16))
    ]
    prefill = [
        Row("prefill, 512 tokens, no routing", (None,), 0.98, 1.0, "prefill", PREFILL_TOKENS),
        *(
            Row(
                f"prefill, {batch} x 512 tokens, half of the blocks",
                (half,) * batch,
                1.6,
                2.0,
                "prefill",
                PREFILL_TOKENS,
            )
            for batch in (1, 4)
        ),
    ]
    return (*none, *all_skip, *mixed, *prefill, *_exit_rows(plans), *_long_rows())


def half_of_the_blocks() -> RoutingPolicy:
    """Leaves out every other block."""
    return RoutingPolicy(SkipSet.of(blocks=_spread(LAYERS // 2)))


def _exit_rows(plans: RecordedPlans) -> list[Row]:
    replayed = [
        Row(
            f"decode, batch {batch}, {name} replayed",
            plans.policies(name, batch),
            bar,
            plans.ideal(name),
        )
        for name in plans.names
        for batch, bar in plans.bars(name).items()
    ]
    early = RoutingPolicy(exit=always_after(LAYERS // 2 - 1))
    exact = RoutingPolicy(exit=always_after(LAYERS // 2 - 1, MissingKV.RECOMPUTE))
    mixed = [
        Row(
            f"decode, batch 8, {leaving} leave halfway",
            alternating(early, leaving, 8),
            0.98,
            1 / (1 - 0.5 * leaving / 8),
        )
        for leaving in (1, 4, 8)
    ]
    recompute = Row("decode, batch 8, 8 leave halfway and recompute", (exact,) * 8, None, None)
    return [*replayed, *mixed, recompute]


def _long_rows() -> list[Row]:
    """Attention at a long context; the row without any shows what there is to save."""
    return [
        Row(
            f"decode, batch 8, 4096 tokens of context, {name} attention",
            (RoutingPolicy(SkipSet.of(attention=_spread(count), phase=Phase.DECODE)),) * 8,
            ideal=None,
            prompt_tokens=LONG_TOKENS,
            same_prompts=True,
        )
        for name, count in (("half of the", LAYERS // 2), ("no", LAYERS))
    ]


def always_after(layer: int, kv: MissingKV = MissingKV.PROPAGATE) -> ExitRule:
    """A rule that every token leaves by, with the cost of one test on the LM head."""
    return ExitRule("replay", (layer,), script=(layer,), kv=kv)


def _spread(count: int) -> tuple[int, ...]:
    """`count` layers spread evenly: every other one from layer 1 on for a half."""
    return tuple(int((i + 0.5) * LAYERS / count) for i in range(count))


def alternating(policy: RoutingPolicy, routed: int, batch: int) -> tuple[RoutingPolicy | None, ...]:
    """Routed and stock requests, alternating."""
    return tuple(policy if i * routed % batch < routed else None for i in range(batch))
