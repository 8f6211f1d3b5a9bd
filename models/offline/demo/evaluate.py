"""Measures held-out exact match of the demo model, in process or through a running server."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sluice.models.offline.demo.tasks.tasks import LONGER_TASKS, TASKS, Item, distinct, longer_items
from sluice.models.offline.evaluate.http_backend import CONCURRENCY, HttpBackend
from sluice.models.offline.evaluate.score import TaskScore as TaskScore
from sluice.models.offline.evaluate.score import percent as percent
from sluice.models.offline.evaluate.score import score as scored
from sluice.models.offline.hf_model.examples import Example

Answerer = Callable[[Sequence[str]], Sequence[str]]
"""Answers prompts, in order."""

MAX_ANSWER_TOKENS = 48
"""Longer than any right answer."""

BAR = 0.95
"""Exact match that every task of the shipped model reaches."""


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
    answers = iter(answer([item.prompt for item in flat]))
    return scored(items, {task: [next(answers) for _ in group] for task, group in items.items()})


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
    concurrency: int = CONCURRENCY,
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

    Raises:
        PolicyRefusedError: the server refuses the routing; from the answerer.
        EvaluationError: it fails or is not there; from the answerer.
    """
    backend = HttpBackend(base_url, model, api_key, concurrency)

    def answer(prompts: Sequence[str]) -> list[str]:
        examples = [Example(prompt=prompt) for prompt in prompts]
        replies = backend.answers(examples, routing, MAX_ANSWER_TOKENS)
        if reports is not None:
            reports.extend(report for reply in replies for report in reply.reports)
        return [reply.text for reply in replies]

    return answer


def examples(items: Mapping[str, Sequence[Item]]) -> dict[str, list[Example]]:
    """Items as the evaluation of any model takes them."""
    return {
        task: [Example(prompt=item.prompt, answer=item.answer, task=task) for item in group]
        for task, group in items.items()
    }


def evaluate_local(model_dir: Path, items_per_task: int, seed: int) -> dict[str, TaskScore]:
    """Measure a weights folder in process."""
    return score(heldout_items(items_per_task, seed), local_answerer(model_dir))


def evaluate_server(
    base_url: str,
    model: str,
    items_per_task: int,
    seed: int,
    routing: Mapping[str, Any] | None = None,
    concurrency: int = CONCURRENCY,
    api_key: str = "EMPTY",
) -> dict[str, TaskScore]:
    """Measure a running server; see ``server_answerer`` and ``heldout_items`` for arguments."""
    answer = server_answerer(base_url, model, routing, concurrency, api_key)
    return score(heldout_items(items_per_task, seed), answer)
