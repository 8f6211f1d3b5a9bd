"""Launches on static buffers against plain calls: equality, and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from sluice.models.engine.captured.decode import (
    CapturedDecode,
    DecodeBuffers,
    LayerMasks,
    Pair,
    Parts,
)
from sluice.models.engine.captured.recorders import CudaGraphs, DirectCalls, Limits
from sluice.models.offline.bench.gpu.decoder import StaticDecoder

_LIMITS = Limits(seconds=300.0, memory=8 << 30)
_PLANS = 20
"""Random plans that both ways run."""


class Bench:
    """Figures of one decoder."""

    def __init__(
        self, decoder: StaticDecoder, sizes: Sequence[int], context: int, repeats: int
    ) -> None:
        """Capture the launches for batches of `sizes` rows."""
        weight = decoder.model.lm_head.weight
        self._decoder = decoder
        self._sizes = sizes
        self._context = context
        self._repeats = repeats
        self._device = weight.device
        self._layers = len(decoder.layers)
        cuda = weight.is_cuda
        self._captured, self._direct = (
            CapturedDecode(
                decoder.layers,
                DecodeBuffers.allocate(
                    self._layers, max(sizes), weight.shape[1], weight.dtype, weight.device
                ),
                recorder,
                _LIMITS,
            )
            for recorder in (CudaGraphs() if cuda else DirectCalls(), DirectCalls())
        )
        self.figures: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if cuda else "CPU",
            "torch": torch.__version__,
            "layers": self._layers,
            "hidden": weight.shape[1],
        }

    def run(self) -> dict[str, Any]:
        """All figures; milliseconds unless a name says otherwise."""
        spending = self._captured.spending
        for rows in self._sizes:
            before = spending.seconds, spending.memory, len(self._captured)
            complete = self._captured.capture(rows) and self._direct.capture(rows)
            assert complete, "a limit of capturing was reached"
            launches = len(self._captured) - before[2]
            self.figures[f"{rows} rows: capture, seconds"] = round(spending.seconds - before[0], 2)
            self.figures[f"{rows} rows: bytes per launch"] = (
                spending.memory - before[1]
            ) // launches
            self.figures[f"{rows} rows: random plans that differ"] = self._differing(rows)
            self._time(rows)
        return self.figures

    def _differing(self, rows: int) -> int:
        """Random plans whose result is not the same in every bit, or not finite."""
        generator = np.random.default_rng(rows)
        differing = 0
        for _ in range(_PLANS):
            masks = random_masks(generator, self._layers, rows)
            tokens = int(generator.integers((rows + 1) // 2, rows + 1))
            hidden = self._hidden(tokens)
            positions = torch.full((tokens,), self._context // 2, device=self._device)
            results = []
            for decode in (self._captured, self._direct):
                self._poison(masks, tokens)
                pair = self._step(decode, rows, masks, hidden, positions)
                written = [layer.keys[:tokens].clone() for layer in self._decoder.layers]
                results.append([pair[0] + pair[1], *written])
            same = all(
                torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
                for a, b in zip(*results, strict=True)
            )
            differing += not (same and bool(results[0][0].isfinite().all()))
        return differing

    def _poison(self, masks: Sequence[LayerMasks], tokens: int) -> None:
        """Where a row skips an attention, its K/V there are NaN; elsewhere the same each time."""
        for index, (layer, mask) in enumerate(zip(self._decoder.layers, masks, strict=True)):
            skips = torch.from_numpy(~mask.attention[:tokens]).to(self._device)
            for cache in (layer.keys, layer.values):
                cache.fill_(0.01 * (index + 1))
                cache[:tokens].masked_fill_(skips[:, None, None, None], torch.nan)

    def _time(self, rows: int) -> None:
        hidden = self._hidden(rows)
        positions = torch.full((rows,), self._context // 2, device=self._device)
        for layer in self._decoder.layers:
            layer.keys.zero_(), layer.values.zero_()
        full = [LayerMasks(*np.ones((3, rows), dtype=np.bool_))] * self._layers
        self._step(self._captured, rows, full, hidden, positions)
        self._step(self._direct, rows, full, hidden, positions)
        halves = {
            "all layers": range(self._layers),
            "first half": range(self._layers // 2),
            "every other": range(0, self._layers, 2),
        }
        ways: dict[str, Callable[[], object]] = {}
        for name, layers in halves.items():
            for way, decode in (
                ("plain calls", self._direct),
                ("a launch a layer", self._captured),
            ):
                ways[f"{name}, {way}"] = _one_by_one(decode, layers, rows)
        for name, count in (("all layers", self._layers), ("first half", self._layers // 2)):
            ways[f"{name}, fewest launches"] = _together(self._captured, count, rows)
        pair = self._captured.buffers.delta[:rows], self._captured.buffers.residual[:rows]
        flag = torch.zeros((), dtype=torch.bool, device=self._device)
        ways["LM head and a flag read"] = lambda: self._test(pair, flag)
        ways["a flag read"] = flag.item
        ways["fill of a layer"] = lambda: self._captured.launch(Parts.FILL, 0, 1, rows)
        for name, values in self._interleaved(ways).items():
            self.figures[f"{rows} rows: {name}"] = round(median(values), 4)

    def _test(self, pair: Pair, flag: torch.Tensor) -> None:
        flag.copy_(self._decoder.logits(*pair).amax() > 0)
        flag.item()

    def _interleaved(self, ways: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Milliseconds of each, in turn."""
        times: dict[str, list[float]] = {name: [] for name in ways}
        for run in ways.values():
            run()
        for _ in range(self._repeats):
            for name, run in ways.items():
                self._synchronize()
                began = time.perf_counter()
                run()
                self._synchronize()
                times[name].append(1000 * (time.perf_counter() - began))
        return times

    def _hidden(self, rows: int) -> torch.Tensor:
        weight = self._decoder.model.lm_head.weight
        generator = torch.Generator().manual_seed(rows)
        hidden = torch.randn((rows, weight.shape[1]), generator=generator)
        return hidden.to(weight.device, weight.dtype)

    def _step(
        self,
        decode: CapturedDecode,
        rows: int,
        masks: Sequence[LayerMasks],
        hidden: torch.Tensor,
        positions: torch.Tensor,
    ) -> Pair:
        tokens = len(hidden)
        masks = [LayerMasks(*(each[:tokens] for each in mask)) for mask in masks]
        return decode.begin(hidden, positions, rows).all_layers(masks)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def random_masks(generator: np.random.Generator, layers: int, rows: int) -> list[LayerMasks]:
    """Masks of a step, sparse or dense; who attends writes K/V."""
    drawn = [LayerMasks(*(generator.random((3, rows)) < generator.random())) for _ in range(layers)]
    return [mask._replace(writes=mask.writes | mask.attention) for mask in drawn]


def _one_by_one(decode: CapturedDecode, layers: Sequence[int], rows: int) -> Callable[[], None]:
    def run() -> None:
        for index in layers:
            decode.launch(Parts.BLOCK, index, 1, rows)

    return run


def _together(decode: CapturedDecode, layers: int, rows: int) -> Callable[[], None]:
    return lambda: decode.launch(Parts.BLOCK, 0, layers, rows)
