"""Recorded exits, replayed at the cost of a real test.

Not offered over HTTP: the benchmark measures with it what the exits of one model save on another,
whose random weights would exit nowhere. The test on the LM head runs and does not decide.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sluice.models.depth.exits.confidence import Confidence
from sluice.models.depth.method import ExitPoint
from sluice.models.policy.policy import ExitRule

if TYPE_CHECKING:
    from torch import Tensor


class Replay(Confidence):
    """Generated token i leaves after layer `script[i % len(script)]` at the latest."""

    name = "replay"
    description = "where a recording left"
    source = "recorded exits"
    parameters = {}
    decays = False
    offered = False

    def threshold(self, rule: ExitRule, index: int, max_tokens: int) -> float:  # noqa: ARG002
        """The scripted layer."""
        script = rule.numbers("script")
        return script[index % len(script)]

    def leaves(self, at: ExitPoint) -> Tensor:
        """See `ExitMethod.leaves`."""
        # No difference of probabilities is above one.
        unreachable = at.threshold.new_full(at.threshold.shape, 2.0)
        return super().leaves(replace(at, threshold=unreachable)) | (at.threshold <= at.layer)
