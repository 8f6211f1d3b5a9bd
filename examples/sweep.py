"""Sweep of a control: quality, compute and speed at several values of `effort`.

Shows how to find the value that suits your tasks: every item of `data/tasks.jsonl` is asked at each
effort, all at once, and a row says how many answers were right and what they took. Speed is of this
one run on this machine, so it is a hint and no measurement.

    .venv/bin/python examples/sweep.py [--url http://127.0.0.1:8000]
"""

from __future__ import annotations

import asyncio
import json
import time

import openai
from serving import DATA, server, url_argument

EFFORTS = (1.0, 0.75, 0.625, 0.5, 0.375)


async def ask(client: openai.AsyncOpenAI, prompt: str, effort: float) -> tuple[str, float, int]:
    """The answer, its share of full depth's compute, and its tokens."""
    answer = await client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        extra_body={"routing": {"effort": effort, "report": True}},
    )
    generated = answer.model_extra["routing"]["generated"]
    text = answer.choices[0].message.content
    return text, generated["compute_fraction"], answer.usage.completion_tokens


async def sweep(url: str) -> None:
    """Print a row for each effort."""
    tasks = [json.loads(line) for line in (DATA / "tasks.jsonl").read_text().splitlines()]
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    print("effort   right      compute of the answers   tokens/s")
    for effort in EFFORTS:
        began = time.perf_counter()
        answers = await asyncio.gather(*(ask(client, each["prompt"], effort) for each in tasks))
        seconds = time.perf_counter() - began
        right = sum(
            text.strip() == each["answer"]
            for each, (text, _, _) in zip(tasks, answers, strict=True)
        )
        compute = sum(share for _, share, _ in answers) / len(answers)
        speed = sum(tokens for _, _, tokens in answers) / seconds
        print(f"{effort:6.3f}   {right:2} of {len(tasks):2}   {compute:22.1%}   {speed:8.0f}")


def main() -> None:
    """Sweep over the server of `--url`, or over one of its own."""
    with server(url_argument(__doc__)) as url:
        asyncio.run(sweep(url))


if __name__ == "__main__":
    main()
