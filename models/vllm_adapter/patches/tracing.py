"""Seam: vLLM's span of a request gets attributes of ours before it is exported.

Replaces `instrument_manual` in vLLM's `output_processor`, and `add_request` and `do_tracing` of the
engine client's `OutputProcessor`. vLLM makes the span `llm_request` in the HTTP process when a
request's last token arrives. What the request ran is known a little later, from the worker. So the
span of a routed request is kept back, with its times, until its attributes are complete. Nothing is
replaced where vLLM traces nothing (no `--otlp-traces-endpoint`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import WeakKeyDictionary

from sluice.models.policy.extra_args import RoutingExtraArgs
from sluice.models.vllm_adapter.patching import SeamMovedError, wrap_once

Attributes = Mapping[str, str | int | float | Sequence[int] | Sequence[str]]

_METHODS = ("add_request", "do_tracing")

_held: ContextVar[list[dict[str, Any]] | None] = ContextVar("held", default=None)


@dataclass(eq=False, slots=True)
class _Waiting:
    """What is known of a request whose answer is on its way.

    Attributes:
        attributes: for its spans.
        spans: made so far, as arguments of `instrument_manual`; samples of a request have one each.
        closed: nobody will add to the attributes.
    """

    attributes: dict[str, Any]
    spans: list[dict[str, Any]] = field(default_factory=list)
    closed: bool = False


class RequestSpans:
    """Holds the spans of routed requests until their attributes are complete."""

    def __init__(self, export: Callable[..., None]) -> None:
        self._export = export
        self._waiting: dict[str, _Waiting] = {}
        self._of_state: WeakKeyDictionary[Any, _Waiting] = WeakKeyDictionary()

    @classmethod
    def attach(cls, engine_client: Any) -> Self | None:
        """Stand before an engine client's tracing; None if it traces nothing.

        Args:
            engine_client: vLLM's `AsyncLLM`.

        Raises:
            SeamMovedError: a part is not where 0.32.0 has it.
        """
        config = engine_client.vllm_config.observability_config
        if config.otlp_traces_endpoint is None:
            return None
        from vllm.tracing import instrument_manual
        from vllm.v1.engine import output_processor

        processor: Any = getattr(engine_client, "output_processor", None)
        for name in _METHODS:
            if not hasattr(processor, name):
                raise SeamMovedError(f"`{name}` on the engine client's output processor")
        wrap_once(output_processor, "instrument_manual", _holding)
        spans = cls(instrument_manual)
        processor.add_request = spans._noting(processor, processor.add_request)
        processor.do_tracing = spans._delaying(processor.do_tracing)
        return spans

    def open(self, request_key: str, attributes: Attributes) -> None:
        """Hold the spans of a request that is about to go to the engine.

        Args:
            request_key: of its record.
            attributes: that are known now.
        """
        self._waiting[request_key] = _Waiting(dict(attributes))

    def close(self, request_key: str, attributes: Attributes) -> None:
        """Export the spans of a request that has been answered; later ones no longer wait.

        Args:
            request_key: of its record.
            attributes: the rest.
        """
        waiting = self._waiting.pop(request_key)
        waiting.attributes.update(attributes)
        waiting.closed = True
        self._flush(waiting)

    def _flush(self, waiting: _Waiting) -> None:
        for span in waiting.spans:
            self._export(**{**span, "attributes": {**span["attributes"], **waiting.attributes}})
        waiting.spans.clear()

    def _noting(self, processor: Any, stock: Any) -> Callable[..., None]:
        """`add_request` that knows whose state vLLM has just made."""

        def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
            stock(request, *args, **kwargs)
            params = request.sampling_params
            extra = params and RoutingExtraArgs.from_extra_args(params.extra_args)
            waiting = extra and self._waiting.get(extra.request_key)
            if waiting:
                self._of_state[processor.request_states[request.request_id]] = waiting

        return add_request

    def _delaying(self, stock: Any) -> Callable[..., None]:
        """`do_tracing` whose span waits where somebody waits for it."""

        def do_tracing(output: Any, state: Any, stats: Any) -> None:
            waiting = self._of_state.get(state)
            if waiting is None:
                stock(output, state, stats)
                return
            token = _held.set(waiting.spans)
            try:
                stock(output, state, stats)
            finally:
                _held.reset(token)
            if waiting.closed:
                self._flush(waiting)

        return do_tracing


def _holding(stock: Any) -> Callable[..., None]:
    def instrument_manual(
        span_name: str,
        start_time: int,
        end_time: int | None = None,
        attributes: dict[str, Any] | None = None,
        context: Any = None,
        kind: Any = None,
    ) -> None:
        held = _held.get()
        if held is None:
            stock(span_name, start_time, end_time, attributes, context, kind)
            return
        held.append(
            {
                "span_name": span_name,
                "start_time": start_time,
                "end_time": end_time or time.time_ns(),
                "attributes": attributes or {},
                "context": context,
                "kind": kind,
            }
        )

    return instrument_manual
