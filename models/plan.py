"""What one engine step runs: for every sub-layer, which token rows execute it.

Rows are the flattened tokens of a vLLM step, request after request. A request's tokens in a step
are a run of prompt tokens followed by a run of generated ones (both only when a preempted request
is recomputed), so a policy gives each request at most two segments. `StepPlan` is pure data and
depends on the composition of the batch only, not on sequence lengths: a decode batch keeps its
plan from step to step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sluice.models.depth.skip import ATTENTION, DECODE, MLP, MODULES, PREFILL, fill_masks

if TYPE_CHECKING:
    import torch

EXECUTED, SKIPPED, FILLED = 0, 1, 2
OUTCOMES = ("executed", "skipped", "filled")

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepRequests:
    """The requests of one step, in batch order; every array has shape (requests,), int64.

    Attributes:
        rows: row of the policy table.
        prefill: scheduled tokens that belong to the prompt.
        decode: scheduled tokens that were generated before.
    """

    rows: IntArray
    prefill: IntArray
    decode: IntArray

    @classmethod
    def of(
        cls, rows: IntArray, scheduled: IntArray, computed: IntArray, prompt: IntArray
    ) -> StepRequests:
        """Split scheduled tokens by the scheduler's counts, never by query length.

        Args:
            rows: policy row per request.
            scheduled: tokens scheduled in this step.
            computed: tokens computed before this step.
            prompt: length of the client's prompt.
        """
        prefill = np.clip(prompt - computed, 0, scheduled)
        return cls(rows=rows, prefill=prefill, decode=scheduled - prefill)

    @property
    def key(self) -> bytes:
        """Equal keys have equal plans."""
        return b"".join(a.tobytes() for a in (self.rows, self.prefill, self.decode))


@dataclass(frozen=True, eq=False)
class Rows:
    """A set of token rows that run one sub-layer together.

    Attributes:
        tokens: row indices, ascending, int64, shape (rows,).
        requests: batch index of each request that has a row here, int64, shape (n,).
        lengths: rows per request, int64, shape (n,).
        trailing: tokens of the request in this step after its last row here, int64, shape (n,).
        everything: all token rows of the step are here.
    """

    tokens: IntArray
    requests: IntArray
    lengths: IntArray
    trailing: IntArray
    everything: bool
    _indices: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def index(self, device: torch.device) -> torch.Tensor:
        """`tokens` on `device`, for gather and scatter; copied there once per plan."""
        # Here, so that the HTTP edge, which shares this module's names, loads no torch.
        import torch

        if device not in self._indices:
            self._indices[device] = torch.from_numpy(self.tokens).to(device)
        return self._indices[device]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Rows of one layer: who attends, who only fills K/V, who runs the MLP."""

    attention: Rows
    fill: Rows
    mlp: Rows


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The whole step.

    Attributes:
        layers: one entry per layer.
        full_depth: no row skips anything: the stock forward serves this step.
        counts: int64, shape (layers, 2 modules, 3 outcomes), token rows.
        request_counts: int64, shape (requests, layers, 2 modules, 3 outcomes).
    """

    layers: tuple[LayerPlan, ...]
    full_depth: bool
    counts: IntArray
    request_counts: IntArray


def build_plan(requests: StepRequests, masks: NDArray[np.bool_]) -> StepPlan:
    """Plan a step.

    Args:
        requests: the step's requests.
        masks: the policy table's masks, shape (rows, 2 phases, layers, 2 modules).
    """
    segments = _Segments.of(requests)
    skip = masks[segments.rows, segments.phases]
    fill = fill_masks(masks)[segments.rows] & (segments.phases == PREFILL)[:, np.newaxis]
    counts = _outcome_counts(skip, fill, segments.lengths)
    request_counts = np.zeros((len(requests.rows), *counts.shape[1:]), dtype=np.int64)
    np.add.at(request_counts, segments.requests, counts)
    interned: dict[bytes, Rows] = {}

    def rows(selected: NDArray[np.bool_]) -> Rows:
        key = selected.tobytes()
        if key not in interned:
            interned[key] = segments.select(selected)
        return interned[key]

    layers = tuple(
        LayerPlan(
            attention=rows(~skip[:, layer, ATTENTION]),
            fill=rows(fill[:, layer]),
            mlp=rows(~skip[:, layer, MLP]),
        )
        for layer in range(masks.shape[2])
    )
    return StepPlan(layers, not skip.any(), counts.sum(axis=0), request_counts)


def _outcome_counts(
    skip: NDArray[np.bool_], fill: NDArray[np.bool_], lengths: IntArray
) -> IntArray:
    """Token rows per segment, layer, module and outcome; outcomes exclude each other."""
    shape = (*skip.shape, len(OUTCOMES))
    hits = np.zeros(shape, dtype=np.int64)
    hits[..., EXECUTED] = ~skip
    hits[..., SKIPPED] = skip
    hits[:, :, ATTENTION, SKIPPED] &= ~fill
    hits[:, :, ATTENTION, FILLED] = fill
    assert skip.shape[-1] == len(MODULES)
    return hits * lengths[:, np.newaxis, np.newaxis, np.newaxis]


@dataclass(frozen=True, slots=True)
class _Segments:
    """Runs of tokens of one request and one phase; arrays of shape (segments,), int64."""

    requests: IntArray
    rows: IntArray
    phases: IntArray
    starts: IntArray
    lengths: IntArray
    total: int

    @classmethod
    def of(cls, step: StepRequests) -> _Segments:
        lengths = np.stack([step.prefill, step.decode], axis=1).ravel()
        keep = lengths > 0
        requests = np.repeat(np.arange(len(step.rows)), 2)[keep]
        phases = np.tile(np.array([PREFILL, DECODE]), len(step.rows))[keep]
        starts = (np.cumsum(lengths) - lengths)[keep]
        return cls(requests, step.rows[requests], phases, starts, lengths[keep], int(lengths.sum()))

    def select(self, selected: NDArray[np.bool_]) -> Rows:
        """Rows of the chosen segments. One request's chosen segments are always adjacent."""
        starts, lengths = self.starts[selected], self.lengths[selected]
        tokens = np.concatenate(
            [np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
            or [np.empty(0, dtype=np.int64)]
        )
        requests, inverse = np.unique(self.requests[selected], return_inverse=True)
        per_request = np.bincount(inverse, weights=lengths, minlength=len(requests))
        chosen_end = np.zeros(len(requests), dtype=np.int64)
        np.maximum.at(chosen_end, inverse, starts + lengths)
        request_end = np.zeros(int(self.requests.max(initial=-1)) + 1, dtype=np.int64)
        np.maximum.at(request_end, self.requests, self.starts + self.lengths)
        return Rows(
            tokens=tokens,
            requests=requests,
            lengths=per_request.astype(np.int64),
            trailing=request_end[requests] - chosen_end,
            everything=len(tokens) == self.total,
        )
