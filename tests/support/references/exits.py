"""Exit rules for one generated token, written from the papers.

Sources: CALM (arXiv 2207.07061), DeeBERT (arXiv 2004.12993), PABEE (NeurIPS 2020), PALBERT
(NeurIPS 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sluice.models.policy.policy import ExitRule

Head = Callable[[Tensor], Tensor]
"""Residual stream (hidden,) to logits (vocabulary,): final norm, then LM head."""

DECAYING = ("confidence", "saturation", "classifier")


class ExitTest:
    """One token's walk from exit to exit; ask at every layer of the rule, in order."""

    def __init__(
        self, rule: ExitRule, head: Head, heads: Mapping[str, Tensor], index: int, limit: int
    ) -> None:
        """`index` is the generated token's, from 0; `limit` the request's max_tokens."""
        self._rule, self._head, self._heads = rule, head, heads
        self._threshold = decayed(rule, index, limit)
        self._answer: int | None = None
        self._agreed = 0
        self._stays = 1.0
        self.margin = math.inf

    def score(self, before: Tensor, after: Tensor) -> float:
        """What the rule looks at, from the residual stream around one layer, each (hidden,)."""
        match self._rule.method:
            case "confidence":
                probabilities = torch.softmax(self._head(after), dim=0).sort().values
                return float(probabilities[-1] - probabilities[-2])
            case "entropy":
                return float(torch.distributions.Categorical(logits=self._head(after)).entropy())
            case "saturation":
                return float(torch.nn.functional.cosine_similarity(after, before, dim=0))
            case "patience":
                logits = self._head(after)
                top = logits.sort().values
                self.margin = min(self.margin, float(top[-1] - top[-2]))
                answer = int(logits.argmax())
                self._agreed = self._agreed + 1 if answer == self._answer else 0
                self._answer = answer
                return float(self._agreed)
            case "q_exit":
                x = torch.cat([after, before])
                for part in ("0", "1", "2"):
                    x = self._tensor(f"{part}.weight") @ x + self._tensor(f"{part}.bias")
                    x = x if part == "2" else torch.tanh(x)
                self._stays *= 1.0 - float(torch.sigmoid(x[0].double()))
                return 1.0 - self._stays
            case "classifier":
                return float(
                    torch.sigmoid(torch.dot(self._tensor("weight"), after) + self._tensor("bias"))
                )
        raise ValueError(f"unknown exit method {self._rule.method!r}")

    def leaves(self, score: float) -> bool:
        """Whether a token with this score leaves."""
        if self._rule.method == "patience":
            return score >= self._rule.number("patience")
        assert self._threshold is not None
        self.margin = min(self.margin, abs(score - self._threshold))
        if self._rule.method == "entropy":
            return score <= self._threshold
        if self._rule.method == "q_exit":
            return score > self._threshold
        return score >= self._threshold

    def _tensor(self, name: str) -> Tensor:
        return self._heads[f"{self._rule.method}.{name}"]


def decayed(rule: ExitRule, index: int, limit: int) -> float | None:
    """CALM's threshold for generated token `index` of at most `limit`."""
    threshold = None if rule.get("threshold") is None else rule.number("threshold")
    if rule.decay is None:
        return threshold
    if threshold is None or rule.method not in DECAYING:
        raise ValueError(f"{rule.method} has no threshold that decays")
    value = 0.9 * threshold + 0.1 * math.exp(-rule.decay * index / limit)
    return min(max(value, 0.0), 1.0)


def pays(gains: Sequence[float | None]) -> bool:
    """Whether the next token is tested under `sparing`, from the gains of those before it.

    None is a token that was not tested. The last four tests must have saved what they cost;
    otherwise one token in sixteen is tested.
    """
    tested = [gain for gain in gains if gain is not None]
    if len(tested) < 4 or sum(tested[-4:]) >= 0:
        return True
    since = 0
    for gain in reversed(gains):
        if gain is not None:
            break
        since += 1
    return since >= 15
