"""What a server says while it starts: one line, once it answers."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from typing import Any

from sluice.server.telemetry.build_info import sluice_version

_POLL_SECONDS = 0.02
AS_LONG_AS_FITS = -1
"""Of vLLM's `--max-model-len`, which has `auto` for it: the model's context, or what fits."""


async def announce(state: Any, line: str) -> None:
    """Print a line once the server answers.

    Args:
        state: of the app; vLLM puts uvicorn's server there, as `server`, just before it starts.
        line: to print.
    """
    while not getattr(getattr(state, "server", None), "started", False):
        await asyncio.sleep(_POLL_SECONDS)
    print(line, flush=True)


def ready_line(
    args: Namespace, model: str, presets: int, context: tuple[int, int] | None = None
) -> str:
    """What serves which model where, and with how many presets.

    Args:
        args: of `sluice serve`; `host` and `port` are those that are bound.
        model: id that requests ask for.
        presets: their number.
        context: (tokens that fit into the K/V cache, tokens of the model's context), if fewer fit.
    """
    url = base_url(args)
    parts = [f"Sluice {sluice_version()}", model, url]
    if args.console:
        parts.append("console /console" if args.uds else f"console {url}/console")
    parts.append("1 preset" if presets == 1 else f"{presets} presets")
    if context is not None:
        fits, whole = context
        parts.append(f"context of {fits} tokens, not {whole}: more K/V cache takes more")
    return " - ".join(parts)


def shortened_context(model_config: Any) -> tuple[int, int] | None:
    """(tokens that fit, tokens of the model's context) where vLLM was to fit it, and fewer fit.

    Args:
        model_config: vLLM's `ModelConfig`, once the engine has started.
    """
    if model_config.original_max_model_len != AS_LONG_AS_FITS:
        return None
    whole = model_config.get_and_verify_max_len(AS_LONG_AS_FITS)
    fits = model_config.max_model_len
    return (fits, whole) if fits < whole else None


def base_url(args: Namespace) -> str:
    """Where the server listens: scheme, host and port, or the socket's path."""
    if args.uds:
        return f"unix:{args.uds}"
    scheme = "https" if args.ssl_keyfile and args.ssl_certfile else "http"
    host = args.host or "0.0.0.0"  # vLLM binds every interface.
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}"


def hide_uvicorn_information() -> None:
    """Leave out what uvicorn says when it starts and ends; warnings and the access log stay."""
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.levelno >= logging.WARNING)
