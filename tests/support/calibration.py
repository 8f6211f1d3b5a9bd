"""Calibrations of tiny models, which have no tokenizer: prompts are token ids."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny import FAMILIES, VOCABULARY, make_model

from sluice.models.offline.calibrate.step import Calibration
from sluice.models.offline.calibrate.workspace import Workspace
from sluice.models.offline.hf_model.examples import Example
from sluice.models.offline.hf_model.model import HFModel

MOE_FAMILIES = tuple(
    name
    for name, (_, settings) in FAMILIES.items()
    if settings.keys() & {"num_experts", "num_local_experts", "n_routed_experts"}
)


class TokenModel(HFModel):
    """A model whose examples' texts are token ids with spaces between them."""

    def encode(self, example: Example) -> tuple[int, ...]:
        assert example.text is not None
        return tuple(map(int, example.text.split()))

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        return TokenIds()


class TokenIds:
    """The tokenizer of a `TokenModel`."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [*map(int, text.split())]}


def example_of(ids: Sequence[int], **fields: Any) -> Example:
    """An example whose prompt has these token ids; `fields` are its others."""
    return Example(text=" ".join(map(str, ids)), **fields)


def drawn_prompts(count: int, seed: int = 0, low: int = 3, high: int = 17) -> list[list[int]]:
    """Prompts of `low` to `high` random tokens, of unlike lengths."""
    rng = random.Random(seed)
    lengths = [rng.randint(low, high) for _ in range(count)]
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def make_biased(family: str, folder: Path, **changes: Any) -> Path:
    """As `make_model`, with biases that are not zero."""
    make_model(family, folder, **changes)
    model = plain_model(folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


def plain_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model in plain transformers, its experts one after the other."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    return model.requires_grad_(False).train(False)


def one_text_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no text stand beside another in a batch."""
    batches = HFModel.batches
    monkeypatch.setattr(HFModel, "batches", lambda self, samples: batches(self, samples, 1))


def plain_track(things: Iterable[Any], _what: str, _total: int) -> Iterable[Any]:
    """No progress bar."""
    return things


def calibration_of(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    workspace: Path,
    *,
    labels: Sequence[str | None] | None = None,
    tasks: Sequence[Example] = (),
    new_tokens: int = 6,
    seed: int = 0,
    dtype: torch.dtype | str = torch.float32,
) -> Calibration:
    """A calibration of the model in `folder` on prompts of token ids.

    Args:
        folder: of a tiny model.
        prompts: token ids.
        workspace: an empty folder.
        labels: of the prompts; none by default.
        tasks: made with `example_of`.
        new_tokens: most tokens of a continuation.
        seed: of the calibration.
        dtype: of the weights.
    """
    given = labels or [None] * len(prompts)
    examples = [example_of(ids, label=label) for ids, label in zip(prompts, given, strict=True)]
    workspace.mkdir(parents=True, exist_ok=True)
    return Calibration(
        model=TokenModel.of(str(folder), dtype=dtype),
        prompts=tuple(examples),
        tasks=tuple(tasks),
        new_tokens=new_tokens,
        seed=seed,
        workspace=Workspace(workspace),
        track=plain_track,
        # What is compiled is compiled for minutes.
        eager=True,
    )
