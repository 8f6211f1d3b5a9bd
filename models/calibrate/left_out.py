"""Sub-layers left out of some tokens, in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sluice.models.calibrate.subject import Subject
from sluice.models.policy import SkipSet


@contextmanager
def left_out(subject: Subject, skip: SkipSet, rows: Tensor) -> Iterator[None]:
    """Within, the sub-layers of a skip set add nothing to the residual stream of some tokens.

    Keys and values of those tokens are still there for others to attend. Where the tokens are all
    generated ones, nobody attends them: it is a request that skips while it decodes.

    Args:
        subject: whose passes are changed.
        skip: attentions and MLPs; its phase is not read.
        rows: the tokens, bool, (rows, tokens).
    """

    def silence(_module: Any, _arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        silent = hidden.masked_fill(rows[..., None], 0.0)
        return (silent, *output[1:]) if isinstance(output, tuple) else silent

    hook: Callable[..., Any] = silence
    named = [(layer, "self_attn") for layer in skip.attention]
    named += [(layer, "mlp") for layer in skip.mlp]
    handles = [
        subject.blocks[layer].get_submodule(name).register_forward_hook(hook)
        for layer, name in named
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
