"""Texts that an engine generates token by token, each token given: teacher forcing as it is served.

A request generates as it always does: its prompt is read, every further token is a decode step, and
the policy acts on each as it acts on a client's. But what is sampled is the text's next token,
whatever the model would have said. So every token is judged after the text's own tokens before it,
and with the keys and values that the policy left of them, under every policy that a client can ask
for. A prompt's log probabilities would not show this: policies of generated tokens do nothing to
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sluice.models.offline.engine import OfflineEngine, Request
from sluice.models.policy.policy import RoutingPolicy
from sluice.models.telemetry.request_record import RoutingRecord

_KEY = 32
"""Characters of a request's key. vLLM writes more behind it, to tell equal ids apart."""


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens at each place of a text, and how likely they are.

    Attributes:
        ids: int64, (places, tokens).
        log_probs: fp32, (places, tokens).
    """

    ids: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Text:
    """What is read.

    Attributes:
        prompt: token ids, one or more.
        tokens: token ids that are generated after it, one or more.
        against: full depth's likeliest tokens at each of `tokens`, or None.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    against: TopTokens | None = None


@dataclass(frozen=True)
class Reading:
    """What a policy makes of a text's tokens; all tensors are on the CPU.

    Attributes:
        log_probs: of the tokens, fp32, (tokens,).
        likeliest: token that greedy decoding would have taken at each place, int64, (tokens,).
        divergence: Kullback-Leibler divergence of the policy's distribution from the one in
            `against`, nats, fp32, (tokens,); zeros without one. It is of the distributions over
            the tokens of `against` and one rest, and so at most that over the vocabulary.
        top: the likeliest tokens, as many as were asked for.
    """

    log_probs: Tensor
    likeliest: Tensor
    divergence: Tensor
    top: TopTokens


def read_forced(
    engine: OfflineEngine,
    texts: Sequence[Text],
    policy: RoutingPolicy,
    batch: int,
    *,
    top: int = 0,
) -> tuple[list[Reading], tuple[RoutingRecord, ...]]:
    """Generate texts under a policy.

    Args:
        engine: in this process, with no request running.
        texts: what is generated.
        policy: of all of them.
        batch: requests at a time.
        top: how many of the likeliest tokens to keep.

    Returns:
        Readings and records, in order.
    """
    requests = [Request(text.prompt, policy, len(text.tokens)) for text in texts]
    by_key = {
        request.key: _Read.of(text, top) for request, text in zip(requests, texts, strict=True)
    }
    with _forced(engine.model_runner, by_key):
        outcome = engine.run(requests, (), batch)
    return [by_key[request.key].reading for request in requests], outcome.records


@dataclass
class _Read:
    """A text while it is read; the tensors are filled in place."""

    text: Text
    reading: Reading

    @classmethod
    def of(cls, text: Text, top: int) -> _Read:
        count = len(text.tokens)
        kept = TopTokens(torch.zeros(count, top, dtype=torch.long), torch.zeros(count, top))
        zeros = torch.zeros(count)
        likeliest = torch.zeros(count, dtype=torch.long)
        return cls(text, Reading(zeros, likeliest, zeros.clone(), kept))

    def note(self, place: int, log_probs: Tensor) -> None:
        """Judge a token.

        Args:
            place: of the token.
            log_probs: fp32, (vocabulary,).
        """
        reading, against = self.reading, self.text.against
        reading.log_probs[place] = log_probs[self.text.tokens[place]]
        reading.likeliest[place] = log_probs.argmax()
        count = reading.top.ids.size(1)
        if count:
            values, ids = log_probs.topk(count)
            reading.top.ids[place], reading.top.log_probs[place] = ids, values
        if against is not None:
            own = log_probs.cpu()[against.ids[place]]
            reading.divergence[place] = divergence(against.log_probs[place], own)


def divergence(expected: Tensor, given: Tensor) -> float:
    """Kullback-Leibler divergence over some tokens and the rest, nats.

    Args:
        expected: log probabilities of the tokens, fp32, (tokens,).
        given: of the same tokens in the other distribution.
    """
    # What is left for the rest may be rounded to nothing, or below.
    least = torch.tensor(1e-12, dtype=torch.float64)
    p, q = expected.double(), given.double()
    rest_p, rest_q = ((1 - each.exp().sum()).clamp(least) for each in (p, q))
    whole = (p.exp() * (p - q)).sum() + rest_p * (rest_p / rest_q).log()
    return max(float(whole), 0.0)


@contextmanager
def _forced(runner: Any, by_key: Mapping[str, _Read]) -> Iterator[None]:
    """Within, what the LM head says of a text's place is noted, and its token is sampled.

    Works on both of vLLM's model runners: the core is told each step's requests in the order in
    which the runner asks for their logits.
    """
    core, model = runner.core, runner.get_model()
    plan, compute = core.plan, model.compute_logits
    steps: list[Any] = []

    def planned(requests: Any) -> Any:
        steps[:] = [requests]
        return plan(requests)

    def computed(hidden: Tensor) -> Tensor | None:
        logits: Tensor | None = compute(hidden)
        if logits is None or not steps:
            return logits
        return _sampled(logits, steps.pop(), by_key)

    core.plan, model.compute_logits = planned, computed
    try:
        yield
    finally:
        del core.plan
        model.compute_logits = compute


def _sampled(logits: Tensor, requests: Any, by_key: Mapping[str, _Read]) -> Tensor:
    """Note what is said of the places, and let nothing but the texts' tokens be sampled.

    Args:
        logits: (requests, vocabulary).
        requests: of the step, `StepRequests`.
        by_key: texts by their requests' keys.
    """
    reads = [by_key[request_id[:_KEY]] for request_id in requests.ids]
    places = np.asarray(requests.computed + requests.scheduled - requests.prompt).tolist()
    # A part of a prompt samples nothing.
    rows = [row for row, place in enumerate(places) if 0 <= place < len(reads[row].text.tokens)]
    log_probs = logits[rows].float().log_softmax(-1)
    for row, own in zip(rows, log_probs, strict=True):
        reads[row].note(places[row], own)
    given = logits.new_full(logits.shape, float("-inf"))
    given[:, 0] = 0.0
    if rows:
        tokens = [reads[row].text.tokens[places[row]] for row in rows]
        given[rows, 0] = float("-inf")
        given[rows, tokens] = 0.0
    return given
