"""Two servers in turn: stock vLLM and Sluice, on equal prompts, policy by policy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from sluice.loadtest.comparison.decode import BatchTimes, timed_batch
from sluice.models.offline.intervals import median_interval

_TIMEOUT_SECONDS = 600
_WARM_UP_TOKENS = 8


@dataclass(slots=True)
class Pairs:
    """What one policy took at one batch size, repeat by repeat.

    Attributes:
        policy: its name.
        batch: requests at once.
        stock: stock vLLM's times.
        ours: Sluice's, under the policy.
    """

    policy: str
    batch: int
    stock: list[BatchTimes] = field(default_factory=list)
    ours: list[BatchTimes] = field(default_factory=list)

    def to_wire(self) -> dict[str, Any]:
        """As JSON values; ratios are stock's time over ours, above 1 is faster than stock vLLM."""
        pairs = [*zip(self.stock, self.ours, strict=True)]
        decode = median_interval([stock.decode / ours.decode for stock, ours in pairs])
        total = median_interval([stock.total / ours.total for stock, ours in pairs])
        return {
            "policy": self.policy,
            "batch": self.batch,
            "decode_ratio": decode.model_dump(),
            "total_ratio": total.model_dump(),
            "stock_seconds": [[each.decode, each.total] for each in self.stock],
            "our_seconds": [[each.decode, each.total] for each in self.ours],
        }


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        model: id of the model on both servers.
        prompts: what users say; every repeat takes the next ones, and both servers the same.
        policies: `routing` objects by name; None sends none.
        batches: requests at once.
        repeats: pairs of each policy and batch, 6 or more.
        tokens: of every answer.
        routed: requests of each batch that have the policy, fewer than the batch; the times are
            of their neighbours. None: all have it, and the times are of all.
    """

    model: str
    prompts: Sequence[str]
    policies: Mapping[str, Mapping[str, Any] | None]
    batches: Sequence[int]
    repeats: int
    tokens: int
    routed: int | None = None

    def run(self, stock_url: str, our_url: str, say: Callable[[str], None]) -> list[Pairs]:
        """Measure on two running servers.

        All policies are measured in every repeat, so that what else the machine does falls on all
        of them. Which server goes first alternates.

        Args:
            stock_url: of stock vLLM, without ``/v1``.
            our_url: of Sluice.
            say: told of progress, a line at a time.

        Raises:
            AnswerError: a server refused a request.
            httpx.HTTPError: a server is not there.
        """
        return asyncio.run(self._run(stock_url, our_url, say))

    async def _run(self, stock_url: str, our_url: str, say: Callable[[str], None]) -> list[Pairs]:
        rows = [Pairs(name, batch) for batch in self.batches for name in self.policies]
        async with (
            _client(stock_url) as stock,
            _client(our_url) as ours,
        ):
            for repeat in range(-1, self.repeats):  # The one before the first is a warm-up.
                say("warm-up" if repeat < 0 else f"repeat {repeat + 1} of {self.repeats}")
                for row in rows:
                    await self._pair(row, repeat, stock, ours)
        return rows

    async def _pair(
        self, row: Pairs, repeat: int, stock: httpx.AsyncClient, ours: httpx.AsyncClient
    ) -> None:
        start = (repeat + 1) * row.batch
        prompts = [self.prompts[(start + n) % len(self.prompts)] for n in range(row.batch)]
        routed = row.batch if self.routed is None else self.routed
        none: Sequence[Mapping[str, Any] | None] = [None] * row.batch
        policies = [*[self.policies[row.policy]] * routed, *none[routed:]]
        sides = [(stock, none, row.stock), (ours, policies, row.ours)]
        tokens = self.tokens if repeat >= 0 else min(self.tokens, _WARM_UP_TOKENS)
        for client, routings, times in sides[:: 1 if repeat % 2 else -1]:
            taken = await timed_batch(
                client, self.model, prompts, routings, tokens, self.routed or 0
            )
            if repeat >= 0:
                times.append(taken)


def _client(url: str) -> httpx.AsyncClient:
    """A client without idle connections: a server closes them after seconds, as we wait longer."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_SECONDS, limits=limits)
