"""Prompts to try a server with: those of the demo's tasks for the demo, general ones otherwise."""

from __future__ import annotations

from sluice.models.offline.demo import DEMO_MODEL_DIR

Examples = dict[str, str]
"""Prompts by what they are."""

_DEMO = {
    "sort": "sort 5 2 9 1 4",
    "add": "add 47 38",
    "reverse": "reverse sluice",
    "max": "max 31 87 42 65",
    "lookup": "lookup a3 f7 c1 h9 fah",
    "two hops": "hop ag bd g4 d8 a",
    "fact": "what is the capital of kenya?",
}
_GENERAL = {
    "explain": "Explain in two sentences why the sky is blue.",
    "summarize": (
        "Summarize in one sentence: The library closes at six on weekdays. On the first Monday of "
        "each month it stays open until nine, and there is a reading for children."
    ),
    "list": "List the numbers from 1 to 20, separated by commas.",
    "reason": (
        "A train leaves at 14:40 and arrives at 17:15. How long does the journey take? "
        "Think step by step."
    ),
    "code": "Write a Python function that returns the n-th Fibonacci number.",
}


def example_prompts(model: str) -> Examples:
    """Prompts that fit a model.

    Args:
        model: its folder or its id, as the server was started with it.
    """
    return _DEMO if model == str(DEMO_MODEL_DIR) else _GENERAL
