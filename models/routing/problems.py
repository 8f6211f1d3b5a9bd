"""What a client is told of fields that are not valid.

pydantic's own texts name Python's types and classes, and list every problem there is. Here a
problem is said in the words of the wire format, and a few of them are enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

MOST_NAMED = 5
"""Problems that a message names; it counts the rest."""

_MOST_CHARS = 100

_WORDS: Mapping[str, str] = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "string_unicode": "must be a string",
    "string_pattern_mismatch": "must match {pattern}",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "greater_than": "must be greater than {gt:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
    "not_an_object": "must be an object",
    "unknown_field": "{text}",
    "enum": "must be {expected}",
    "literal_error": "must be {expected}",
}


def first_problem(error: ValidationError, root: str) -> tuple[str, str]:
    """The place and the text of the first problem.

    Args:
        error: of fields that a user wrote.
        root: what to call the object they are in.
    """
    return _problems(error, root)[0]


def described(error: ValidationError, root: str) -> tuple[str, str]:
    """The place of the first problem, and a message that names a few and counts the rest."""
    problems = _problems(error, root)
    named = "; ".join(f"{place}: {text}" for place, text in problems[:MOST_NAMED])
    more = len(problems) - MOST_NAMED
    return problems[0][0], named + (f"; and {more} more" if more > 0 else "")


def unknown_field(name: str, known: Iterable[str]) -> str:
    """What is said of a field that does not exist, with the nearest one that does."""
    fields = sorted(known)
    close = get_close_matches(name[:_MOST_CHARS], fields, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(fields)}"
    return f"no such field; {hint}"


def shortened(text: str, most: int = _MOST_CHARS) -> str:
    """A text of a client's, cut to what an answer or a log line can hold, and printable."""
    cut = text if len(text) <= most else f"{text[:most]}..."
    # A lone surrogate is valid JSON, but no UTF-8 can carry it.
    return cut.encode(errors="backslashreplace").decode()


def dotted(root: str, location: tuple[int | str, ...]) -> str:
    """`("depth", "skip", "blocks", 0)` under `routing` as `routing.depth.skip.blocks.0`."""
    return ".".join([root, *(shortened(str(name)) for name in location)])


def _problems(error: ValidationError, root: str) -> list[tuple[str, str]]:
    return [_problem(each, root) for each in error.errors(include_url=False, include_input=False)]


def _problem(problem: Mapping[str, Any], root: str) -> tuple[str, str]:
    context = problem.get("ctx", {})
    location = problem["loc"]
    if "field" in context:
        # The validator of the whole object found it, so the place lacks the field's name.
        location = (*location, context["field"])
    words = _WORDS.get(problem["type"], "is not valid")
    return dotted(root, location), words.format(**context)
