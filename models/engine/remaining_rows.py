"""What is left of a plan while its layers run: observers take rows out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sluice.models.engine.plan import LayerNeeds, LayerPlan, LayerPlanner, StepPlan
from sluice.models.policy.axes import BoolArray, IntArray


class RemainingRows:
    """Restricts the plans of layers to the rows that no observer has taken out.

    A row that leaves runs no further layer. In the attentions that it would have run its keys and
    values (K/V) are filled, or nothing is, as the observer says. After a leave the layers that
    follow are planned once more, all together.
    """

    def __init__(self, plan: StepPlan, plan_layers: LayerPlanner) -> None:
        self._shape = plan.shape.forked()
        self._planned = plan.layers
        self._plan_layers = plan_layers
        total = len(self._shape.requests)
        self._gone = np.zeros(total, dtype=np.bool_)
        self._filling = np.zeros(total, dtype=np.bool_)
        self._passing: BoolArray | None = None
        self._changed = False
        self._restricted = plan.layers

    def leave(self, tokens: IntArray, *, fill: bool) -> None:
        """Take rows out of all further layers."""
        self._gone[tokens] = True
        self._filling[tokens] = fill
        self._changed = True

    def pass_over(self, tokens: IntArray) -> None:
        """Take rows out of the next layer, without K/V."""
        if self._passing is None:
            self._passing = np.zeros_like(self._gone)
        self._passing[tokens] = True

    def layer(self, index: int) -> LayerPlan:
        """What is left of layer `index`, which comes next."""
        if self._changed:
            after = self._replanned(self._planned[index:], self._gone)
            self._restricted = (*self._planned[:index], *after)
            self._changed = False
        passing, self._passing = self._passing, None
        if passing is None:
            return self._restricted[index]
        (plan,) = self._replanned([self._planned[index]], self._gone | passing)
        return plan

    def after(self, index: int) -> Sequence[LayerPlan]:
        """What is left of the layers after layer `index`, unless more rows are taken out."""
        return self._restricted[index + 1 :]

    def _replanned(self, plans: Sequence[LayerPlan], out: BoolArray) -> list[LayerPlan]:
        shape = self._shape
        needs: dict[int, LayerNeeds] = {}
        for plan in plans:
            if id(plan) not in needs:
                attending = shape.chosen(plan.attention)
                needs[id(plan)] = LayerNeeds(
                    shape.rows(attending & ~out),
                    shape.rows(shape.chosen(plan.fill) | (attending & self._filling)),
                    shape.rows(shape.chosen(plan.mlp) & ~out),
                )
        return self._plan_layers(shape, [needs[id(plan)] for plan in plans])
