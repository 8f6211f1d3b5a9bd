"""Expert controls of the requests in the batch, and what they ask of a step's routers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sluice.models.depth.masks import Segment
from sluice.models.experts.policy_table import STOCK_ROW, ExpertTable
from sluice.models.experts.remix import (
    FixedPathway,
    ModePathway,
    Pathway,
    ReferenceStore,
    Retrieval,
    supplied_pathway,
)
from sluice.models.experts.selection import StepExperts
from sluice.models.policy.axes import DECODE, IntArray
from sluice.models.policy.expert_shape import ExpertShape
from sluice.models.policy.experts import (
    Contrast,
    ExpertBudget,
    ExpertPolicy,
    Remix,
    RemixMethod,
    RemixScope,
)
from sluice.models.profile.profile import Profile


@dataclass(frozen=True, slots=True)
class RequestExperts:
    """One request's expert controls.

    Attributes:
        policy: what it asked for.
        row: of the expert table.
        weak_row: of its contrast's weak pass, or of vLLM's own choice if it has none.
        pathway: of its re-mix, or None.
        last_prompt_token: position.
    """

    policy: ExpertPolicy
    row: int
    weak_row: int
    pathway: Pathway | None
    last_prompt_token: int


class BatchExperts:
    """Expert controls by vLLM's request id; one instance per model runner."""

    def __init__(self, shape: ExpertShape, profile: Profile | None, device: torch.device) -> None:
        self._shape = shape
        self._table = ExpertTable(shape, profile.super_experts if profile else (), device)
        self._device = device
        self._requests: dict[str, RequestExperts] = {}
        self._stores: dict[str, ReferenceStore] = {}
        if profile is not None:
            for name in profile.references:
                self._stores[name] = ReferenceStore(profile, name, device)
        self._retrieval = Retrieval()

    def add(
        self,
        request_id: str,
        policy: ExpertPolicy,
        prompt_tokens: int,
        embedding: Callable[[], torch.Tensor],
    ) -> None:
        """Learn a new request.

        Args:
            request_id: vLLM's.
            policy: not empty.
            prompt_tokens: length of the prompt.
            embedding: gives the model's own embedding of the prompt, fp32, (hidden,).
        """
        contrasts = policy.contrast is not None
        self._requests[request_id] = RequestExperts(
            policy=policy,
            row=self._table.acquire(policy),
            weak_row=self._table.acquire(policy, weak=True) if contrasts else STOCK_ROW,
            pathway=self._pathway(policy.remix, embedding) if policy.remix else None,
            last_prompt_token=prompt_tokens - 1,
        )

    def remove(self, request_id: str) -> None:
        """Forget an ended request."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._table.release(request.row)
            if request.weak_row != STOCK_ROW:
                self._table.release(request.weak_row)

    def contrasts(self, ids: Sequence[str]) -> dict[int, Contrast]:
        """Contrasts of a step's requests by batch index. `ids`: in batch order."""
        requests = self._in_step(ids)
        contrasts = {index: request.policy.contrast for index, request in requests.items()}
        return {index: each for index, each in contrasts.items() if each is not None}

    def step(
        self,
        ids: Sequence[str],
        owners: IntArray,
        segments: Sequence[Segment],
        computed: IntArray,
        scheduled: IntArray,
        first_rows: IntArray,
    ) -> StepExperts | None:
        """What a step asks of the routers, or None if no request in it has expert controls.

        Args:
            ids: vLLM's request ids in batch order.
            owners: batch index of each pass's request, int64, (requests and weak passes,).
            segments: of the step, in row order.
            computed: tokens of each request computed before the step, (requests,).
            scheduled: tokens scheduled in it.
            first_rows: row of the first of them.
        """
        requests = self._in_step(ids)
        if not requests:
            return None
        lengths = np.array([segment.length for segment in segments], dtype=np.int64)
        ends = np.cumsum(lengths)
        rows = np.zeros(len(segments), dtype=np.int64)
        decoding: dict[int, list[IntArray]] = {index: [] for index in requests}
        for number, segment in enumerate(segments):
            owner = int(owners[segment.request])
            request = requests.get(owner)
            if request is None:
                continue
            rows[number] = request.weak_row if segment.weak else request.row
            if segment.phase == DECODE and not segment.weak:
                decoding[owner].append(np.arange(ends[number] - segment.length, ends[number]))
        budgets: dict[ExpertBudget, list[IntArray]] = {}
        remixes: list[tuple[Pathway, IntArray]] = []
        for index, request in requests.items():
            if request.policy.budget is not None:
                budgets.setdefault(request.policy.budget, []).extend(decoding[index])
            if request.pathway is not None:
                last = request.last_prompt_token - int(computed[index])
                scheduled_now = 0 <= last < scheduled[index]
                remixed = [np.array([first_rows[index] + last])] if scheduled_now else []
                if request.pathway.remix.scope is RemixScope.DECODE:
                    remixed += decoding[index]
                remixes.append((request.pathway, _joined(remixed)))
        return StepExperts(
            self._table,
            self._shape,
            self._device,
            np.repeat(rows, lengths),
            {budget: _joined(tokens) for budget, tokens in budgets.items() if tokens},
            remixes,
        )

    def _in_step(self, ids: Sequence[str]) -> dict[int, RequestExperts]:
        """The requests with expert controls, by batch index. `ids`: in batch order."""
        known = self._requests
        return {index: known[each] for index, each in enumerate(ids) if each in known}

    def _pathway(self, remix: Remix, embedding: Callable[[], torch.Tensor]) -> Pathway:
        if remix.method is RemixMethod.SUPPLIED:
            return supplied_pathway(remix, self._device)
        assert remix.references is not None
        store = self._stores[remix.references]
        if remix.method is RemixMethod.MODE:
            return ModePathway(remix, store)
        prompt = embedding() if remix.embedding is None else torch.tensor(remix.embedding)
        return FixedPathway(remix, self._retrieval.start(store, remix, prompt))


def _joined(parts: list[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
