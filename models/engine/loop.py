"""The layer loop: runs a step plan over a decoder's own modules, one loop for every family.

vLLM's fused norms add `delta`, the output of the sub-layer before, to `residual`
(`sluice.models.engine.residual_stream`); so a row that skips a sub-layer just keeps its `delta`
until it runs the next one.

Observers look at the stream on the way and may take rows out. `RemainingRows` then cuts the plans
of the layers that follow. How a layer is run is one of two ways: rows are gathered for it
(`_GatheredLayers`), or all stay in it on static buffers (`sluice.models.engine.captured`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from sluice.models.engine.attention import BatchBuffers, StepContext, rows_forward_context
from sluice.models.engine.captured.decode import CapturedDecode, DecodeRun, LayerMasks, Parts
from sluice.models.engine.observers import LayerObserver
from sluice.models.engine.plan import LayerPlan, LayerPlanner, StepShape
from sluice.models.engine.remaining_rows import RemainingRows
from sluice.models.engine.residual_stream import ResidualStream
from sluice.models.engine.step import RoutedStep
from sluice.models.engine.sublayers.sublayers import SubLayers
from sluice.models.experts.router import ExpertRouter
from sluice.models.vllm_adapter.decoder import DecoderStack


class _Layers(Protocol):
    """A way to run the layers of one step."""

    def layer(self, index: int, plan: LayerPlan) -> None:
        """Run a layer, at the latest when `settle` is called."""

    def settle(self) -> None:
        """Bring the residual stream up to date."""


class LayerLoop:
    """Runs steps with a depth control; one instance per model runner.

    Attributes:
        captured: launches that serve decode steps, or None.
    """

    def __init__(
        self,
        stack: DecoderStack,
        sublayers: SubLayers,
        plan_layers: LayerPlanner,
        router: ExpertRouter | None,
        captured: CapturedDecode | None = None,
    ) -> None:
        self._stack = stack
        self._sublayers = sublayers
        self._plan_layers = plan_layers
        self._router = router
        self.captured = captured

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
        stream = ResidualStream(hidden, torch.zeros_like(hidden))
        remaining = RemainingRows(step.plan, self._plan_layers)
        with rows_forward_context() as context:
            at_rows = StepContext(buffers, context, step, positions)
            layers = _GatheredLayers(self._stack, self._sublayers, at_rows, stream, self._router)
            return self._run(step, layers, stream, remaining), stream

    def run_captured(
        self, step: RoutedStep, positions: torch.Tensor, input_ids: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, ResidualStream]:
        """Run the layers of a step that `captured_by` serves, with `captured` launches.

        Args:
            step: what to run.
            positions: (tokens,), int64.
                input_ids: (tokens,).
            rows: with padding.

        Returns:
            As `run` does; both are overwritten by the next step.
        """
        assert self.captured is not None
        remaining = RemainingRows(step.plan, self._plan_layers)
        decode = self.captured.begin(self._stack.embed(input_ids), positions, rows)
        stream = ResidualStream(*decode.pair)
        layers = _CapturedLayers(decode, remaining, step.plan.shape)
        return self._run(step, layers, stream, remaining), stream

    def _run(
        self, step: RoutedStep, layers: _Layers, stream: ResidualStream, remaining: RemainingRows
    ) -> torch.Tensor:
        control = _Control(remaining, stream)
        for index in range(len(self._stack.layers)):
            observers = [o for o in step.observers if len(o.tokens) and index in o.layers]
            if any(observer.needs_before for observer in observers):
                layers.settle()
            befores = [_before(observer, index, stream, control) for observer in observers]
            layers.layer(index, remaining.layer(index))
            if observers:
                layers.settle()
            self._look(index, observers, befores, stream, control)
        layers.settle()
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
        return final

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


def captured_by(step: RoutedStep) -> bool:
    """Whether launches on static buffers could serve a step.

    A step that only decodes, without expert controls, and without rows that vLLM did not schedule.
    """
    return step.plan.shape.one_row_each and step.experts is None


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


class _GatheredLayers:
    """Gathers the rows that a sub-layer is to run, with attention metadata of their own."""

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

    def settle(self) -> None:
        """Nothing waits."""


class _CapturedLayers:
    """Runs all rows in every layer that one of them wants, whatever else a plan says."""

    def __init__(self, decode: DecodeRun, remaining: RemainingRows, shape: StepShape) -> None:
        self._remaining = remaining
        self._decode = decode
        self._shape = shape
        self._loaded: list[LayerPlan] = []
        self._wanted: dict[int, _Wanted] = {}
        self.settle = decode.settle

    def layer(self, index: int, plan: LayerPlan) -> None:
        """Put the masks in place that are new, and run what they want."""
        if index >= len(self._loaded) or self._loaded[index] is not plan:
            plans = [plan, *self._remaining.after(index)]
            self._loaded[index:] = plans
            self._decode.load(index, [self._of(each).masks for each in plans])
        self._decode.layer(index, self._of(plan).parts)

    def _of(self, plan: LayerPlan) -> _Wanted:
        if id(plan) not in self._wanted:
            attention, fill, mlp = map(self._shape.chosen, (plan.attention, plan.fill, plan.mlp))
            masks = LayerMasks(attention, mlp, attention | fill)
            self._wanted[id(plan)] = _Wanted(plan, masks, masks.parts)
        return self._wanted[id(plan)]


class _Wanted(NamedTuple):
    """What a plan wants of a layer; with the plan, so that nothing else gets its identity."""

    plan: LayerPlan
    masks: LayerMasks
    parts: tuple[Parts, ...]
