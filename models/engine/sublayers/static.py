"""The parts of a vLLM layer on static buffers, for `sluice.models.engine.captured`.

Whether a row writes K/V is a mask there. The slots of those that do not become -1 on the way, in
tensors that belong to the launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from vllm.forward_context import get_forward_context, override_forward_context

from sluice.models.engine.captured.decode import DecodeRows
from sluice.models.engine.sublayers.functions import Pair, attend, fill, run_mlp
from sluice.models.vllm_adapter.decoder import DecoderLayer


class StaticLayer:
    """Implements `sluice.models.engine.captured.decode.DecodeLayer`.

    It reads the slots and the attention metadata of vLLM's forward context at the time of the call.
    """

    def __init__(self, layer: DecoderLayer) -> None:
        self._layer = layer

    def attend(self, rows: DecodeRows) -> Pair:
        """See `DecodeLayer.attend`."""
        with _writing(self._layer.kv_name, rows.writes):
            return attend(self._layer, rows.delta, rows.residual, rows.positions)

    def run_mlp(self, delta: torch.Tensor, residual: torch.Tensor) -> Pair:
        """See `DecodeLayer.run_mlp`."""
        return run_mlp(self._layer, delta, residual)

    def fill(self, rows: DecodeRows) -> None:
        """See `DecodeLayer.fill`."""
        with _writing(self._layer.kv_name, rows.writes):
            fill(self._layer, rows.delta, rows.residual, rows.positions)


@contextmanager
def _writing(name: str, writes: torch.Tensor) -> Iterator[None]:
    context = get_forward_context()
    slots = torch.where(writes, context.slot_mapping[name][: len(writes)], -1)
    mapping = {**context.slot_mapping, name: slots}
    with override_forward_context(replace(context, slot_mapping=mapping)):
        yield
