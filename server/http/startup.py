"""What a server says while it starts: one line, once it answers."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from typing import Any

from sluice.server.telemetry.build_info import sluice_version

_POLL_SECONDS = 0.02


async def announce(state: Any, line: str) -> None:
    """Print a line once the server answers.

    Args:
        state: of the app; vLLM puts uvicorn's server there, as `server`, just before it starts.
        line: to print.
    """
    while not getattr(getattr(state, "server", None), "started", False):
        await asyncio.sleep(_POLL_SECONDS)
    print(line, flush=True)


def ready_line(args: Namespace, model: str, presets: int) -> str:
    """What serves which model where, and with how many presets.

    Args:
        args: of `sluice serve`; `host` and `port` are those that are bound.
        model: id that requests ask for.
        presets: their number.
    """
    url = base_url(args)
    parts = [f"Sluice {sluice_version()}", model, url]
    if args.console:
        parts.append("console /console" if args.uds else f"console {url}/console")
    parts.append("1 preset" if presets == 1 else f"{presets} presets")
    return " - ".join(parts)


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
