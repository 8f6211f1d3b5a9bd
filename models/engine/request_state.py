"""State of one request: the mask of each of its tokens, of those that ran and of those to come.

A prompt token's mask is known before it runs. Generated tokens either share the request's mask (a
static set, or a mask decided from the prompt), or the mask of each is decided while it runs. Such
decisions are stored: a preempted request repeats them when its tokens are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from sluice.models.depth.masks import DepthMask, MaskTable, Segment, phase_masks
from sluice.models.depth.method import TokenMethod
from sluice.models.depth.recompute import PendingTokens
from sluice.models.depth.registry import adaptive_method
from sluice.models.depth.sparing import ExitHistory
from sluice.models.policy.axes import DECODE, PREFILL, BoolArray, FloatArray, IntArray
from sluice.models.policy.extra_args import RoutingExtraArgs
from sluice.models.policy.policy import MissingKV


class RequestState:
    """Masks of one request, as rows of the mask table.

    Attributes:
        extra: the request's policy and the key of its record.
        max_tokens: longest output the client allowed.
        prompt_tokens: length of the prompt.
        statistics: per-layer sums that a prompt method has pooled so far, (layers,), float64.
        counted: prompt tokens in `statistics`.
        decided: whether a prompt method has decided.
        wanted: mask of generated tokens that the policy alone gives.
        pending: generated tokens whose upper layers are still to run (`kv: recompute`).
        history: what came of the exit tests, if the policy is sparing with them.
    """

    def __init__(
        self,
        extra: RoutingExtraArgs,
        prompt_tokens: int,
        max_tokens: int,
        table: MaskTable,
        worth: FloatArray,
    ) -> None:
        """Start a request.

        Args:
            extra: its policy and the key of its record.
            prompt_tokens: length of the prompt.
            max_tokens: longest output the client allowed.
            table: of masks.
            worth: of leaving after each layer, in LM heads, (layers,).
        """
        self.extra = extra
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        num_layers = table.skip.shape[1]
        self.statistics = np.zeros(num_layers)
        self.counted = 0
        self.decided = False
        rule = extra.policy.exit
        recomputes = rule is not None and rule.kv is MissingKV.RECOMPUTE
        self.pending = PendingTokens() if recomputes else None
        sparing = rule is not None and rule.sparing
        self.history = ExitHistory(rule.layers, worth) if rule is not None and sparing else None
        self._table = table
        self._rows: set[int] = set()
        self._prompt: int | IntArray
        prefill, self.wanted = phase_masks(extra.policy.skip, num_layers)
        self._prompt, self._decode = self.hold(prefill), self.hold(self.wanted)
        self._generated: list[int] = []

    @property
    def records_tokens(self) -> bool:
        """Whether masks of generated tokens are decided one by one."""
        policy = self.extra.policy
        method = None if policy.adaptive is None else adaptive_method(policy.adaptive)
        replaces = isinstance(method, TokenMethod) and method.replaces
        return policy.exit is not None or replaces or policy.skip.elastic

    def segments(self, request: int, computed: int, scheduled: int) -> Iterator[Segment]:
        """The tokens at positions `computed` to `computed + scheduled`, in order."""
        end = computed + scheduled
        yield from self._prompt_segments(request, computed, min(end, self.prompt_tokens))
        first, last = (max(at - self.prompt_tokens, 0) for at in (computed, end))
        stored = self._generated[first:last]
        for mask, run in groupby(stored):
            yield Segment(request, DECODE, mask, len(list(run)))
        if self.pending is not None and last > first:
            self.pending.forget_from(computed)
            for token in self.pending.tokens:
                below = np.arange(len(self.statistics)) <= token.depth
                mask = self.hold(self.wanted.without_blocks(below, fill=False))
                yield Segment(request, DECODE, mask, 1, pending=True)
        new = last - first - len(stored)
        if new > 0:
            yield Segment(request, DECODE, self._decode, new)

    def resume(self, generated: int) -> None:
        """Start again after a preemption, with so many generated tokens.

        Where vLLM schedules ahead, it may drop the token that the last of these gave. Then the
        last one has run already, and is decided again: it must give the same token.
        """
        again = len(self._generated) - max(generated - 1, 0)
        if again > 0:
            del self._generated[-again:]
            if self.pending is not None:
                self.pending.undo(again)
            if self.history is not None:
                self.history.undo(again)

    def has_new_token(self, computed: int, scheduled: int) -> bool:
        """Whether the last of these tokens is a generated one that runs for the first time."""
        return computed + scheduled - self.prompt_tokens > len(self._generated)

    def keep_prompt_tokens(self, kept: BoolArray) -> None:
        """Give each prompt token its own blocks; the others fill. `kept`: (tokens, layers)."""
        rows: dict[bytes, int] = {}
        for pattern in np.unique(kept, axis=0):
            rows[pattern.tobytes()] = self.hold(self.wanted.without_blocks(~pattern, fill=True))
        self._prompt = np.array([rows[pattern.tobytes()] for pattern in kept])

    def decide_prompt(self, skipped: BoolArray, *, masked_prefill: bool) -> None:
        """Fix the mask of all generated tokens. `skipped`: blocks, bool, (layers,)."""
        mask = DepthMask.full(len(skipped)).without_blocks(skipped, fill=False)
        self._decode = self.hold(mask)
        if masked_prefill:
            self._prompt = self._decode
        self.decided = True

    def prompt_mask_as_run(self, planned: int) -> int:
        """Mask that prompt tokens planned with row `planned` ran in the step that decided it."""
        return self._prompt if isinstance(self._prompt, int) else planned

    def decide_token(self, mask: DepthMask) -> int:
        """Store the mask of the generated token that just ran; its row."""
        row = self.hold(mask)
        self._generated.append(row)
        return row

    def agree(self, common: BoolArray) -> int:
        """Decide an elastic token: it skips what the step's elastic rows all can, `common`.

        A layer that one token of the request has skipped is never attended again, because nobody
        wrote that token's K/V there; so what is skipped once stays skipped, MLPs too.

        Args:
            common: bool, (layers, 2 modules), within this request's own set.
        """
        skip = common
        if self._generated:
            skip = skip | self._table.skip[self._generated[-1]]
        return self.decide_token(DepthMask(skip, self.wanted.fill))

    @property
    def decided_skip(self) -> BoolArray | None:
        """What a prompt method decided to leave out, (layers, 2 modules), or None."""
        return self._table.skip[self._decode].copy() if self.decided else None

    def release(self) -> bool:
        """Give all rows of the mask table back; True if one of them became free."""
        freed = [self._table.release(row) for row in self._rows]
        self._rows.clear()
        return any(freed)

    def hold(self, mask: DepthMask) -> int:
        """Row of `mask` in the table, kept until the request ends."""
        row = self._table.acquire(mask)
        # The table counts a request once for each row.
        if row in self._rows:
            self._table.release(row)
        else:
            self._rows.add(row)
        return row

    def _prompt_segments(self, request: int, start: int, end: int) -> Iterator[Segment]:
        if start >= end:
            return
        if isinstance(self._prompt, int):
            yield Segment(request, PREFILL, self._prompt, end - start)
            return
        masks: Sequence[int] = self._prompt[start:end].tolist()
        for mask, run in groupby(masks):
            yield Segment(request, PREFILL, mask, len(list(run)))
