"""Patience: leave when several exits in a row agree on the next token.

Source: PABEE, "BERT Loses Patience" (NeurIPS 2020); per generated token, over the rule's exit
layers. Needs no calibrated probability.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.models.depth.method import ExitMethod, ExitPoint
from sluice.models.depth.parameters import Number
from sluice.models.policy.policy import ExitRule

if TYPE_CHECKING:
    from torch import Tensor


class Patience(ExitMethod):
    """The answer has stayed what it was at the exit before, `patience` times in a row."""

    name = "patience"
    description = "once several layers in a row agree"
    source = "PABEE (NeurIPS 2020)"
    parameters = {"patience": Number(1, 1000, integer=True)}
    needs_logits = True

    def threshold(self, rule: ExitRule, index: int, max_tokens: int) -> float:  # noqa: ARG002
        """Exits that must have agreed."""
        return rule.number("patience")

    def leaves(self, at: ExitPoint) -> Tensor:
        """See `ExitMethod.leaves`."""
        assert at.logits is not None
        answer = at.logits.argmax(-1)
        agreed = answer.new_zeros(answer.shape)
        if "answer" in at.state:
            same = answer == at.state["answer"]
            agreed = (at.state["agreed"] + 1) * same
        at.state.update(answer=answer, agreed=agreed)
        return agreed >= at.threshold
