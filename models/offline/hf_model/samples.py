"""Prompts with their right answers, as one teacher-forced pass reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Token ids of a prompt, as the model gets it, and of its right answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class SampleBatch:
    """Samples side by side, filled up on the right, which a causal model does not see.

    Places count all rows' tokens one after the other.

    Attributes:
        ids: int64, (samples, tokens).
        prompts: bool, (samples, tokens): tokens of a prompt.
        used: bool, (samples, tokens): tokens of a prompt or an answer.
        last: int64, (samples,): place of each prompt's last token.
        where: int64, (answer tokens,): places whose next token belongs to an answer.
        targets: int64, (answer tokens,): those next tokens.
        owner: int64, (answer tokens,): sample that each belongs to.
    """

    ids: Tensor
    prompts: Tensor
    used: Tensor
    last: Tensor
    where: Tensor
    targets: Tensor
    owner: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device | None = None) -> SampleBatch:
        """Lay samples out.

        Raises:
            ValueError: there is no sample, or a prompt or an answer is empty.
        """
        if not samples or not all(sample.prompt and sample.answer for sample in samples):
            raise ValueError("a batch needs samples, each with a prompt and an answer")
        width = max(len(sample.prompt) + len(sample.answer) for sample in samples)
        ids = torch.zeros(len(samples), width, dtype=torch.long)
        prompts = torch.zeros(len(samples), width, dtype=torch.bool)
        used = torch.zeros(len(samples), width, dtype=torch.bool)
        last: list[int] = []
        where: list[int] = []
        targets: list[int] = []
        owner: list[int] = []
        for row, sample in enumerate(samples):
            whole = (*sample.prompt, *sample.answer)
            ids[row, : len(whole)] = torch.tensor(whole)
            prompts[row, : len(sample.prompt)] = True
            used[row, : len(whole)] = True
            last.append(row * width + len(sample.prompt) - 1)
            where += range(last[-1], last[-1] + len(sample.answer))
            targets += sample.answer
            owner += [row] * len(sample.answer)
        places = [torch.tensor(each, device=device) for each in (last, where, targets, owner)]
        return cls(ids.to(device), prompts.to(device), used.to(device), *places)

    @property
    def decoded(self) -> Tensor:
        """Entries of `where` that a decode step would run, bool, (answer tokens,).

        The first token of an answer comes from the prompt's last one.
        """
        return ~self.prompts.flatten()[self.where]

    @property
    def generated(self) -> Tensor:
        """Tokens that a decode step would run, bool, (samples, tokens)."""
        found = torch.zeros_like(self.prompts).flatten()
        found[self.where[self.decoded]] = True
        return found.view_as(self.prompts)

    def answer_logits(self, model: Any) -> Tensor:
        """Run the model: logits at the answer tokens, (answer tokens, vocabulary)."""
        logits: Tensor = model(input_ids=self.ids, use_cache=False).logits
        return logits.flatten(0, 1)[self.where]

    def exact(self, logits: Tensor) -> Tensor:
        """Whether greedy decoding gives each sample's answer, bool, (samples,).

        Args:
            logits: from `answer_logits`.
        """
        misses = torch.zeros(len(self.last), dtype=torch.long, device=logits.device)
        misses.index_add_(0, self.owner, (logits.argmax(-1) != self.targets).long())
        return misses == 0
