"""What went wrong with a server, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice.models.evaluate.reply import EvaluationError, PolicyRefusedError

if TYPE_CHECKING:
    from openai import APIError

_ROUTING = "routing"


def failure(error: APIError, base_url: str, model: str, where: str = "") -> EvaluationError:
    """The error of a request, as ours.

    Args:
        error: of OpenAI's client.
        base_url: address that was asked.
        model: id that was asked for; a preset may be part of it.
        where: file and line of the example that was asked, if it was one.
    """
    from openai import (
        APIConnectionError,
        APIStatusError,
        APITimeoutError,
        AuthenticationError,
    )

    if isinstance(error, APITimeoutError):
        return EvaluationError(f"{base_url}: no answer in time")
    if isinstance(error, APIConnectionError):
        return EvaluationError(f"{base_url}: no server answers: {error.__cause__ or error}")
    if isinstance(error, AuthenticationError):
        return EvaluationError(f"{base_url}: the server wants another --api-key")
    message, param = _said(error)
    if param is not None and (
        param.split(".")[0] == _ROUTING or (param == "model" and "@" in model)
    ):
        return PolicyRefusedError(message, param)
    if isinstance(error, APIStatusError) and error.status_code < 500 and where:
        return EvaluationError(f"{where}: {message}")
    status = f" answers {error.status_code}" if isinstance(error, APIStatusError) else ""
    return EvaluationError(f"{base_url}{status}: {message}")


def _said(error: APIError) -> tuple[str, str | None]:
    """Message and param of an OpenAI-shaped error, or its text."""
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message), body.get("param")
