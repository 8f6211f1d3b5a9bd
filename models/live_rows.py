"""Rows that left the loop on the way, and what that leaves of each layer's plan."""

from __future__ import annotations

import numpy as np

from sluice.models.plan import Arrange, BoolArray, IntArray, LayerPlan, StepShape


class LiveRows:
    """Restricts layer plans to the rows that are still there.

    A row that leaves stops running; in the attentions it would have run, its K/V are filled, unless
    it leaves without. Row sets are cut once per event and shared by the layers that follow.
    """

    def __init__(self, shape: StepShape, arrange: Arrange) -> None:
        self._shape = shape.forked()
        self._arrange = arrange
        total = len(shape.requests)
        self._gone = np.zeros(total, dtype=np.bool_)
        self._filling = np.zeros(total, dtype=np.bool_)
        self._passing: BoolArray | None = None
        self._any = False
        self._cut: dict[int, LayerPlan] = {}

    def leave(self, tokens: IntArray, *, fill: bool) -> None:
        """Take rows out of all further layers."""
        self._gone[tokens] = True
        self._filling[tokens] = fill
        self._any = True
        self._cut.clear()

    def pass_over(self, tokens: IntArray) -> None:
        """Take rows out of the next layer, without K/V."""
        if self._passing is None:
            self._passing = np.zeros_like(self._gone)
        self._passing[tokens] = True

    def restrict(self, plan: LayerPlan) -> LayerPlan:
        """What is left of the next layer."""
        passing, self._passing = self._passing, None
        if passing is None:
            if not self._any:
                return plan
            cut = self._cut.get(id(plan))
            if cut is None:
                cut = self._cut[id(plan)] = self._restricted(plan, self._gone)
            return cut
        return self._restricted(plan, self._gone | passing)

    def _restricted(self, plan: LayerPlan, out: BoolArray) -> LayerPlan:
        shape = self._shape
        attending = shape.chosen(plan.attention)
        return self._arrange(
            shape,
            shape.rows(attending & ~out),
            shape.rows(shape.chosen(plan.fill) | (attending & self._filling)),
            shape.rows(shape.chosen(plan.mlp) & ~out),
        )
