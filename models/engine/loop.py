"""The layer loop: runs a step plan over a decoder's own modules, one loop for every family.

The residual stream (`ResidualStream`) is vLLM's pair `(delta, residual)`, whose sum is the hidden
state. vLLM's fused norms add `delta`, the output of the sub-layer before, to `residual`; so a row
that skips a sub-layer just keeps its `delta` until it runs the next one. Rows that run are gathered
(compacted), and stay gathered as long as the following sub-layers run the same rows.

Observers look at the stream on the way and may take rows out. `RemainingRows` then cuts the plans
of the layers that follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sluice.kernels.ops.row_compact import row_compact, row_scatter
from sluice.models.engine.attention import BatchBuffers, StepContext, rows_forward_context
from sluice.models.engine.observers import LayerObserver
from sluice.models.engine.plan import LayerNeeds, LayerPlan, LayerPlanner, Rows, StepPlan
from sluice.models.engine.step import RoutedStep
from sluice.models.engine.sublayers.sublayers import SubLayers
from sluice.models.experts.router import ExpertRouter
from sluice.models.policy.axes import BoolArray, IntArray
from sluice.models.vllm_adapter.decoder import DecoderStack


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


class ResidualStream:
    """vLLM's pair `(delta, residual)` of all rows, (tokens, hidden) each; the sum is the state."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self._all = (hidden, torch.zeros_like(hidden))
        self._view = self._all
        self._rows: Rows | None = None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._all[0].device

    def select(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair of `rows`; what was selected before is written back first."""
        wanted = None if rows.everything else rows
        if wanted is not self._rows:
            self.expand()
            if wanted is not None:
                index = wanted.index(self._all[0].device)
                self._view = row_compact(*self._all, index)
            self._rows = wanted
        return self._view

    def store(self, delta: torch.Tensor, residual: torch.Tensor) -> None:
        """Replace the selected rows' pair."""
        self._view = (delta, residual)
        if self._rows is None:
            self._all = self._view

    def expand(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair of all rows."""
        if self._rows is not None:
            index = self._rows.index(self._all[0].device)
            row_scatter(*self._all, index, *self._view)
            self._rows, self._view = None, self._all
        return self._all

    def hidden(self, tokens: IntArray) -> torch.Tensor:
        """Copy of the hidden states of rows, (rows, hidden), in the model's dtype."""
        delta, residual = self.expand()
        if len(tokens) == len(delta):
            return delta + residual
        index = torch.from_numpy(tokens).to(delta.device)
        delta, residual = row_compact(delta, residual, index)
        return delta + residual

    def assign(self, tokens: IntArray, hidden: torch.Tensor) -> None:
        """Set the hidden states of rows. `hidden`: (rows, hidden)."""
        delta, residual = self.expand()
        index = torch.from_numpy(tokens).to(delta.device)
        row_scatter(delta, residual, index, torch.zeros_like(hidden), hidden)


class LayerLoop:
    """Runs steps with a depth control; one instance per model runner."""

    def __init__(
        self,
        stack: DecoderStack,
        sublayers: SubLayers,
        plan_layers: LayerPlanner,
        router: ExpertRouter | None,
    ) -> None:
        self._stack = stack
        self._sublayers = sublayers
        self._plan_layers = plan_layers
        self._router = router

    def run(
        self,
        step: RoutedStep,
        positions: torch.Tensor,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        buffers: BatchBuffers,
    ) -> tuple[torch.Tensor, ResidualStream]:
        """Run the layers.

        Args:
            step: what to run.
            positions: (scheduled,), int64.
            input_ids: (scheduled,) or None if `inputs_embeds` is given.
            inputs_embeds: (scheduled, hidden) or None.
            buffers: of the step's batch.

        Returns:
            Hidden states of the scheduled rows after the final norm, (scheduled, hidden), and the
            residual stream of all rows of the step before it.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            hidden = self._stack.embed(input_ids)
        else:
            # Fused norms work in place, and this is the runner's own buffer.
            hidden = inputs_embeds.clone()
        hidden, positions = _with_unscheduled(step, hidden, positions)
        stream = ResidualStream(hidden)
        remaining = RemainingRows(step.plan, self._plan_layers)
        with rows_forward_context() as context:
            at_rows = StepContext(buffers, context, step, positions)
            run = _Run(self._stack, self._sublayers, at_rows, stream, self._router)
            control = _Control(remaining, stream)
            for index in range(len(self._stack.layers)):
                observers = [o for o in step.observers if len(o.tokens) and index in o.layers]
                befores = [_before(observer, index, stream, control) for observer in observers]
                run.layer(index, remaining.layer(index))
                self._look(index, observers, befores, stream, control)
            for observer in step.observers:
                observer.finish(control)
            delta, residual = stream.expand()
            if step.plan.shape.pending:
                kept = torch.from_numpy(step.plan.shape.scheduled).to(delta.device)
                delta, residual = delta[kept], residual[kept]
            if step.reads_stream:
                # The norm works in place.
                delta, residual = delta.clone(), residual.clone()
            final, _ = self._stack.final_norm(delta, residual)
        return final, stream

    def _look(
        self,
        index: int,
        observers: list[LayerObserver],
        befores: list[torch.Tensor | None],
        stream: ResidualStream,
        control: _Control,
    ) -> None:
        """Show the layer's output to its observers; one LM head for all that want logits."""
        afters = [stream.hidden(observer.tokens) for observer in observers]
        wanting = [i for i, observer in enumerate(observers) if observer.needs_logits]
        logits: dict[int, torch.Tensor] = {}
        if wanting:
            joined = self._stack.logits(torch.cat([afters[i] for i in wanting]))
            parts = torch.split(joined, [len(observers[i].tokens) for i in wanting])
            logits = dict(zip(wanting, parts, strict=True))
        for i, observer in enumerate(observers):
            observer.after_layer(index, befores[i], afters[i], logits.get(i), control)


def _before(
    observer: LayerObserver, layer: int, stream: ResidualStream, control: _Control
) -> torch.Tensor | None:
    if not observer.needs_before:
        return None
    before = stream.hidden(observer.tokens)
    if observer.looks_ahead:
        observer.before_layer(layer, before, control)
    return before


def _with_unscheduled(
    step: RoutedStep, hidden: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and positions of all rows: pending ones put in, weak passes at the end."""
    shape = step.plan.shape
    if not shape.pending:
        return hidden, positions
    scheduled = torch.from_numpy(shape.scheduled).to(hidden.device)
    waiting = torch.ones(len(shape.requests), dtype=torch.bool, device=hidden.device)
    waiting[scheduled] = False
    if step.weak is not None:
        waiting[len(waiting) - len(step.weak.sources) :] = False
    all_hidden = hidden.new_empty((len(waiting), hidden.shape[1]))
    all_positions = positions.new_empty(len(waiting))
    all_hidden[scheduled], all_positions[scheduled] = hidden, positions
    if step.pending is not None:
        all_hidden[waiting] = step.pending
        all_positions[waiting] = torch.from_numpy(step.pending_positions).to(positions.device)
    if step.weak is not None:
        sources = torch.from_numpy(step.weak.sources).to(hidden.device)
        all_hidden[-len(sources) :] = all_hidden[sources]
        all_positions[-len(sources) :] = all_positions[sources]
    return all_hidden, all_positions


class _Control:
    """Implements `sluice.models.engine.observers.LoopControl`."""

    def __init__(self, remaining: RemainingRows, stream: ResidualStream) -> None:
        self.leave = remaining.leave
        self.pass_over = remaining.pass_over
        self.assign = stream.assign


class _Run:
    """Runs the sub-layers of one step."""

    def __init__(
        self,
        stack: DecoderStack,
        sublayers: SubLayers,
        context: StepContext,
        stream: ResidualStream,
        router: ExpertRouter | None,
    ) -> None:
        self._names = [layer.kv_name for layer in stack.layers]
        self._sublayers = sublayers
        self._context = context
        self._stream = stream
        self._router = router

    def layer(self, index: int, plan: LayerPlan) -> None:
        """Fill, attend, and run the MLP."""
        attend, mlp, fill = plan.attend, plan.run_mlp, plan.separate_fill
        if len(fill):
            positions = self._context.enter(self._names[index], fill, fill)
            self._sublayers.fill[index](*self._stream.select(fill), positions)
        if len(mlp.rows) and self._router is not None:
            self._router.enter(mlp.rows.tokens, mlp.dropped)
        kept = attend.kept(self._stream.device), mlp.kept(self._stream.device)
        if len(attend.rows):
            positions = self._context.enter(self._names[index], attend.rows, plan.writes)
            pair = self._stream.select(attend.rows)
            if attend.rows is mlp.rows:
                self._stream.store(*self._sublayers.block[index](*pair, positions, *kept))
                return
            self._stream.store(*self._sublayers.attend[index](*pair, positions, kept[0]))
        if len(mlp.rows):
            pair = self._stream.select(mlp.rows)
            self._stream.store(*self._sublayers.run_mlp[index](*pair, kept[1]))
