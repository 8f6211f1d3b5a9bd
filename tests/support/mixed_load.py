"""Requests of many kinds at once, and what their answers say was run."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import openai
from support.serving import Server

_CONFIDENT = {"method": "confidence", "threshold": 0.9, "layers": [2, 4]}

ROUTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"depth": {"skip": {"blocks": [2]}}},
    {"depth": {"skip": {"attention": [1], "mlp": [7]}, "phase": "decode"}},
    {"depth": {"skip": {"attention": [4]}, "phase": "prefill"}},
    {"depth": {"exit": {"method": "fixed", "layers": [5]}}},
    {"depth": {"exit": _CONFIDENT}},
    {"depth": {"exit": {**_CONFIDENT, "kv": "recompute"}}},
    {"depth": {"adaptive": {"method": "similarity", "budget": 0.6}}},
    {"effort": 0.5},
    {"preset": "light", "effort": 0.75},
    {"experts": {"top_k": 1, "protect_super_experts": False}},
    {"experts": {"deactivate": [{"layer": 3, "experts": [0, 2, 7, 11]}]}},
    {"experts": {"budget": {"method": "oea", "k0": 1}}},
    {"depth": {"skip": {"blocks": [6]}}, "experts": {"skip_ratio": 0.4}},
)
"""Accepted by every demo server with a preset `light`; each is sent with `report`."""

REFUSED: tuple[tuple[dict[str, Any], str, str], ...] = (
    ({"depth": {"skip": {"blocks": [8]}}}, "custom", "layer_out_of_range"),
    ({"no": 1}, "custom", "invalid_field"),
    ({"preset": "nobody's"}, "custom", "unknown_preset"),
    ({"preset": "light", "depth": {"skip": {"blocks": [1]}}}, "light", "unsupported_combination"),
)
"""Routing that is refused, the preset it is counted under, and why."""

PROMPTS = ("copy hello", "reverse abcdef", "copy xyz", "sort 4 2 9", "count aabba a")


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        options: of the OpenAI client's method.
        routing: None for a stock request.
        preset: that it is counted under.
        refused: reason of its refusal, or None.
        chat: a chat completion, or a plain one of several prompts.
    """

    options: dict[str, Any]
    routing: dict[str, Any] | None = None
    preset: str = "custom"
    refused: str | None = None
    chat: bool = True


@dataclass
class Told:
    """What the answers of a load say.

    Attributes:
        reports: of routed requests.
        plain_rows: token rows of the others.
        plain_generated: generated rows among those.
        completion_tokens: of all requests.
        samples: of all requests.
        plain: requests without routing.
        outcomes: requests by preset and outcome.
        reasons: refusals by reason.
        efforts: asked for.
    """

    reports: list[dict[str, Any]] = field(default_factory=list)
    plain_rows: int = 0
    plain_generated: int = 0
    completion_tokens: int = 0
    samples: int = 0
    plain: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    efforts: list[float] = field(default_factory=list)


def asks(rounds: int) -> list[Ask]:
    """A shuffled mix, the same each time."""
    order = random.Random(7)
    made: list[Ask] = []
    for number in range(rounds):

        def options(prompt: str = PROMPTS[number % len(PROMPTS)], **more: Any) -> dict[str, Any]:
            tokens = order.randint(2, 14)
            return {"model": "demo", "prompt": prompt, "max_tokens": tokens, **more}

        for routing in ROUTINGS:
            preset = routing.get("preset", "custom")
            reported = {**routing, "report": True}
            made.append(Ask(options(stream=order.random() < 0.5), reported, preset))
        reported = {"report": True}
        made.append(Ask(options(model="demo@shallow"), reported, "shallow"))
        made.append(Ask(options(n=2, temperature=1), {"effort": 0.5, **reported}))
        made.append(Ask(options(), {"effort": 0.5, **reported}, chat=False))
        made += [Ask(options(), preset="none", chat=chat) for chat in (True, False)]
        made += [
            Ask(options(), routing, preset, refused=reason) for routing, preset, reason in REFUSED
        ]
    order.shuffle(made)
    return made


def send(server: Server, load: Sequence[Ask], at_once: int = 8) -> Told:
    """Send a load, each request over a connection of its own."""
    told = Told()
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(lambda ask: _answer(server, ask), load))
    for ask, answer in zip(load, answers, strict=True):
        told.outcomes[ask.preset, "rejected" if ask.refused else "ok"] += 1
        if ask.refused is not None:
            told.reasons[ask.refused] += 1
            continue
        usage, report, samples = answer
        told.completion_tokens += usage.completion_tokens
        told.samples += samples
        if ask.routing is None:
            cached = usage.prompt_tokens_details
            assert cached is None or not cached.cached_tokens
            told.plain += 1
            told.plain_generated += usage.completion_tokens - samples
            told.plain_rows += usage.prompt_tokens + usage.completion_tokens - samples
            continue
        assert report["warnings"] == [] or report["experts"]["neighbour_dependent"]
        told.reports.append(report)
        if "effort" in ask.routing:
            told.efforts.append(ask.routing["effort"])
    return told


def _answer(server: Server, ask: Ask) -> Any:
    """Usage, report and number of samples; None of a refused request."""
    options = {"temperature": 0, **ask.options}
    if ask.routing is not None:
        options["extra_body"] = {"routing": ask.routing}
    prompt = options.pop("prompt")
    with server.client() as client:
        if ask.chat:
            options["messages"] = [{"role": "user", "content": prompt}]
            create: Any = client.chat.completions.create
        else:
            options["prompt"] = [prompt, prompt[::-1]]
            create = client.completions.create
        try:
            answer = create(**options)
        except openai.BadRequestError:
            assert ask.refused is not None
            return None
        assert ask.refused is None
        if not options.get("stream"):
            return answer.usage, getattr(answer, "routing", None), len(answer.choices)
        *_, last = answer
        return last.usage, last.routing, 1
