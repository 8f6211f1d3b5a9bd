"""Measures held-out exact match of the demo model, in process or through a running server."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.models.demo.longer import LONGER_TASKS, longer_items
from sluice.models.demo.tasks import TASKS, Item, distinct

if TYPE_CHECKING:
    from rich.table import Table

Answerer = Callable[[Sequence[str]], Sequence[str]]
"""Answers prompts, in order."""

MAX_ANSWER_TOKENS = 48
"""Longer than any right answer."""

BAR = 0.95
"""Exact match that every task of the shipped model reaches."""


@dataclass(frozen=True)
class TaskScore:
    """Outcome on one task; ``misses`` pairs each failed item with what was answered instead."""

    task: str
    items: int
    correct: int
    misses: tuple[tuple[Item, str], ...]

    @property
    def exact_match(self) -> float:
        """Share of items answered exactly, between 0 and 1."""
        return self.correct / self.items


def heldout_items(
    items_per_task: int, seed: int, tasks: Sequence[str] = TASKS
) -> dict[str, list[Item]]:
    """Draw the same number of different held-out items of each task."""
    return {task: distinct(task, "heldout", seed, items_per_task) for task in tasks}


def longer_heldout_items(items_per_task: int, seed: int) -> dict[str, list[Item]]:
    """Draw the same number of different items of each task that has a longer form."""
    return {task: longer_items(task, seed, items_per_task) for task in LONGER_TASKS}


def score(items: Mapping[str, Sequence[Item]], answer: Answerer) -> dict[str, TaskScore]:
    """Ask everything in one call of ``answer`` and compare with the right answers per task.

    Surrounding white space of an answer does not count.
    """
    flat = [item for group in items.values() for item in group]
    answers = answer([item.prompt for item in flat])
    given = {item.prompt: text.strip() for item, text in zip(flat, answers, strict=True)}
    scores = {}
    for task, group in items.items():
        misses = tuple(
            (item, given[item.prompt]) for item in group if given[item.prompt] != item.answer
        )
        scores[task] = TaskScore(task, len(group), len(group) - len(misses), misses)
    return scores


def local_answerer(model_dir: Path, batch_size: int = 128) -> Answerer:
    """Load a weights folder with plain transformers and answer by batched greedy decoding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    model.to(device)

    def answer(prompts: Sequence[str]) -> list[str]:
        by_length = sorted(set(prompts), key=len)
        answers: dict[str, str] = {}
        for start in range(0, len(by_length), batch_size):
            group = by_length[start : start + batch_size]
            inputs: Any = tokenizer.apply_chat_template(
                [[{"role": "user", "content": prompt}] for prompt in group],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            ).to(device)
            out = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
            new_tokens = out[:, inputs["input_ids"].size(1) :]
            texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            answers.update(zip(group, texts, strict=True))
        return [answers[prompt] for prompt in prompts]

    return answer


def server_answerer(
    base_url: str,
    model: str,
    routing: Mapping[str, Any] | None = None,
    concurrency: int = 32,
    api_key: str = "EMPTY",
    reports: list[Mapping[str, Any]] | None = None,
) -> Answerer:
    """Answer by greedy chat completions of an OpenAI-compatible server.

    Args:
        base_url: address up to and including ``/v1``.
        model: model id to ask for.
        routing: Sluice's ``routing`` object, sent with every request when given.
        concurrency: requests in flight at a time.
        api_key: bearer key.
        reports: grows by the report of every answer; needs ``report`` in ``routing``.
    """

    async def ask(prompts: Sequence[str]) -> list[str]:
        from openai import AsyncOpenAI

        extra_body = None if routing is None else {"routing": dict(routing)}
        in_flight = asyncio.Semaphore(concurrency)

        async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:

            async def ask_one(prompt: str) -> str:
                async with in_flight:
                    completion = await client.chat.completions.create(
                        model=model,
                        messages=[{"role": "user", "content": prompt}],
                        temperature=0,
                        max_tokens=MAX_ANSWER_TOKENS,
                        extra_body=extra_body,
                    )
                if reports is not None:
                    reports.append((completion.model_extra or {})["routing"])
                return completion.choices[0].message.content or ""

            return list(await asyncio.gather(*map(ask_one, prompts)))

    return lambda prompts: asyncio.run(ask(prompts))


def evaluate_local(model_dir: Path, items_per_task: int, seed: int) -> dict[str, TaskScore]:
    """Measure a weights folder in process."""
    return score(heldout_items(items_per_task, seed), local_answerer(model_dir))


def evaluate_server(
    base_url: str,
    model: str,
    items_per_task: int,
    seed: int,
    routing: Mapping[str, Any] | None = None,
    concurrency: int = 32,
    api_key: str = "EMPTY",
) -> dict[str, TaskScore]:
    """Measure a running server; see ``server_answerer`` and ``heldout_items`` for arguments."""
    answer = server_answerer(base_url, model, routing, concurrency, api_key)
    return score(heldout_items(items_per_task, seed), answer)


def percent(share: float) -> str:
    """A share between 0 and 1, to be read."""
    return f"{100 * share:.1f} %"


def table(scores: Mapping[str, TaskScore], title: str = "held-out exact match") -> "Table":
    """Lay the scores out for a terminal, with one miss per task as an example."""
    from rich.markup import escape
    from rich.table import Table

    out = Table(title=title)
    out.add_column("task")
    out.add_column("correct", justify="right")
    out.add_column("exact match", justify="right")
    out.add_column("a miss: prompt / right / given")
    for entry in scores.values():
        style = "green" if entry.exact_match >= BAR else "red"
        example = ""
        if entry.misses:
            item, given = entry.misses[0]
            example = escape(f"{item.prompt} / {item.answer} / {given}")
        share = f"[{style}]{percent(entry.exact_match)}[/]"
        out.add_row(entry.task, f"{entry.correct}/{entry.items}", share, example)
    return out
