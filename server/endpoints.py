"""The paths of vLLM's server, by what they ask of us: one table for keys, limits and routing.

A test holds it against the routes of a running server, so that a new path of vLLM's is noticed.
"""

from __future__ import annotations

from enum import StrEnum

ROUTED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
"""Take `routing`, and presets as model ids."""

GENERATING = ROUTED | {
    "/v1/chat/completions/batch",
    "/cohere/v2/chat",
    "/inference/v1/generate",
    "/invocations",
    "/generative_scoring",
    "/v1/systemone",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/pooling",
    "/classify",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/v1/embeddings",
    "/v2/embed",
}
"""Ask the engine for work."""

TEXT = frozenset(
    {
        "/tokenize",
        "/detokenize",
        "/v1/messages/count_tokens",
        "/v1/chat/completions/render",
        "/v1/completions/render",
        "/v1/messages/render",
        "/v1/responses/render",
        "/v1/chat/completions/derender",
        "/v1/completions/derender",
    }
)
"""Turn text into tokens or back; the engine does nothing for them."""

OPEN = frozenset({"/health", "/ping", "/console"})
"""Need no key, and what is below them neither: health checks, and the console, which asks for one.
"""

METRICS = "/metrics"


class Kind(StrEnum):
    """What a path is to us."""

    OPEN = "open"
    READ = "read"
    TEXT = "text"
    GENERATING = "generating"
    MANAGING = "managing"


def kind_of(method: str, path: str) -> Kind:
    """What a request is for.

    What is in no list and is no GET may change the server: it counts as managing.

    Args:
        method: of HTTP; empty for a websocket.
        path: below the app's root; one with a slash at its end is redirected to the one without.
    """
    path = path.rstrip("/")
    if method == "OPTIONS" or any(path == name or path.startswith(f"{name}/") for name in OPEN):
        return Kind.OPEN
    if method in ("GET", "HEAD", ""):
        return Kind.READ
    if path in GENERATING:
        return Kind.GENERATING
    # A response that was stored is cancelled by whoever knows its id.
    if path in TEXT or path.startswith("/v1/responses/"):
        return Kind.TEXT
    return Kind.MANAGING
