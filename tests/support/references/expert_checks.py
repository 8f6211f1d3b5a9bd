"""What tests of the expert reference, and tests against it, have in common."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sluice.models.policy.experts import Remix, RemixMethod, RemixScope

from .experts import ExpertReference
from .remixes import ReferenceStore
from .streams import ExpertRun

FAMILIES = (
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
)


def assert_same_run(run: ExpertRun, other: ExpertRun) -> None:
    """Same tokens, same experts, weights to 1e-5."""
    assert run.tokens == other.tokens, (run.margin, other.margin)
    for layer, others in zip(run.selected, other.selected, strict=True):
        assert [set(row) for row in layer] == [set(row) for row in others]
        for row, row_of_other in zip(layer, others, strict=True):
            assert row == pytest.approx(row_of_other, abs=1e-5)


@contextmanager
def changed(reference: ExpertReference) -> Iterator[ExpertReference]:
    """A copy to change weights and routers of."""
    other = copy.deepcopy(reference)
    with torch.no_grad():
        yield other


def drawn_remix(reference: ExpertReference, method: str, scope: str, **changes: object) -> Remix:
    """Of two layers, with neighbours among `drawn_references`."""
    settings = {
        "alpha": 0.3,
        "layers": reference.layers[1:3],
        "top": 6,
        "references": "drawn",
        "neighbors": 3,
        "kernel": "gaussian",
        "bandwidth": 0.5,
    }
    return Remix(RemixMethod(method), RemixScope(scope), **{**settings, **changes})


def drawn_references(reference: ExpertReference) -> dict[str, ReferenceStore]:
    """Random references of all layers."""
    generator = torch.Generator().manual_seed(3)
    width = reference.model.config.hidden_size
    logits = torch.randn(9, len(reference.layers), reference.experts, generator=generator)
    embeddings = torch.randn(9, width, generator=generator)
    return {"drawn": ReferenceStore(embeddings, (2.0 * logits).softmax(-1), reference.layers)}
