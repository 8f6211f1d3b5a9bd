"""A builder of attention metadata that keeps one buffer, as FlashAttention 3's does on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engine import Engine, engine
from support.planning import plan_by
from support.reference import Reference
from support.tiny import VOCABULARY, make_model

from sluice.models.engine import attention
from sluice.models.engine.plan import compact
from sluice.models.engine.row_builders import RowBuilders
from sluice.models.policy.policy import Phase, SkipSet

TOKENS = 8
# Sets of rows that come back after others, before and after layers that all rows run.
SKIPS = [
    SkipSet.of(attention=(1, 3)),
    SkipSet.of(blocks=(2, 4)),
    SkipSet.of(attention=(1, 3), phase=Phase.DECODE),
    SkipSet.of(attention=(2,), mlp=(1,), phase=Phase.PREFILL),
    SkipSet(),
]
PROMPTS = [
    [(37 * i * i + 11 * i + seed) % VOCABULARY for i in range(20 + 9 * seed)]
    for seed in range(len(SKIPS))
]


@pytest.fixture(scope="module")
def expected(models_folder: Path) -> list[list[int]]:
    reference = Reference(make_model("llama", models_folder / "builders"))
    return [reference.greedy(p, s, TOKENS) for p, s in zip(PROMPTS, SKIPS, strict=True)]


@pytest.fixture(scope="module")
def running(expected: list[list[int]], models_folder: Path) -> Iterator[Engine]:
    with engine(models_folder / "builders", enable_prefix_caching=False) as started:
        yield started


@pytest.fixture(autouse=True)
def one_buffer(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block tables of all that a builder has built are one buffer; sets of rows are exact."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

    build = CPUAttentionMetadataBuilder.build

    def overwriting(builder: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = build(builder, *args, **kwargs)
        table = metadata.block_table
        if not hasattr(builder, "one_buffer"):
            builder.one_buffer = table.new_zeros((64, table.shape[1]))
        builder.one_buffer[: len(table)] = table
        metadata.block_table = builder.one_buffer[: len(table)]
        return metadata

    monkeypatch.setattr(CPUAttentionMetadataBuilder, "build", overwriting)
    plan_by(running, monkeypatch, compact)


@pytest.mark.parametrize("places", [attention.PLACES, 2, 1])
def test_sets_of_rows_do_not_overwrite_each_other(
    running: Engine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, places: int
) -> None:
    """However few have builders of their own at a time."""
    monkeypatch.setattr(attention, "PLACES", places)
    assert running.generate(PROMPTS, SKIPS, TOKENS) == expected


def test_a_shared_builder_would_show(
    running: Engine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowBuilders, "take", lambda builders, place: builders._stock)
    assert running.generate(PROMPTS, SKIPS, TOKENS) != expected
