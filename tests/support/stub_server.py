"""A server without a model, whose routes a test gives."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Route = Callable[[dict[str, Any]], tuple[int, Any]]
REPORT = {
    "policy": {},
    "layers": [{"layer": 0, "attention": {"executed": 9, "skipped": 1, "filled": 0}}],
    "compute_fraction": 0.5,
    "generated": {"tokens": 2, "mean_layers": 1.5, "compute_fraction": 0.25},
    "warnings": [],
}


@dataclass
class Stub:
    """Routes by path, and what was asked; a path that has none is a 404."""

    url: str = ""
    routes: dict[str, Route] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for where, body in self.asked if where == path]


def error(status: int, message: str, param: str | None = None) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "x", "param": param, "code": status}}


def chat(body: dict[str, Any]) -> tuple[int, Any]:
    """The last message reversed, and a report if one is asked for."""
    text = body["messages"][-1]["content"][::-1]
    message = {"role": "assistant", "content": text}
    wire = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    report = {"routing": REPORT} if body.get("routing", {}).get("report") else {}
    return 200, {**wire, "choices": choices, **report}


def completion(body: dict[str, Any]) -> tuple[int, Any]:
    """Of a text, the text reversed; of tokens, minus a hundredth of each as its log probability."""
    wire = {"id": "1", "object": "text_completion", "created": 0, "model": body["model"]}
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "text": "", "logprobs": None}
    if isinstance(body["prompt"], str):
        choice["text"] = body["prompt"][::-1]
    else:
        read = [None, *(-token / 100 for token in body["prompt"][1:])]
        choice["logprobs"] = {"token_logprobs": read, "tokens": [], "top_logprobs": None}
    report = {"routing": REPORT} if body.get("routing", {}).get("report") else {}
    return 200, {**wire, "choices": [choice], **report}


def tokenize(body: dict[str, Any]) -> tuple[int, Any]:
    """A token a character; 1 begins a text, 2 a conversation."""
    if "messages" in body:
        text, start = body["messages"][-1]["content"], [2]
    else:
        text, start = body["prompt"], [1] if body.get("add_special_tokens", True) else []
    return 200, {"tokens": [*start, *map(ord, text)], "count": 0, "max_model_len": 0}


def models(*ids: str) -> Route:
    cards = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in ids]
    return lambda body: (200, {"object": "list", "data": cards})


@contextmanager
def stub_server() -> Iterator[Stub]:
    """Ours, with model `m`; a test may change its routes."""
    state = Stub()
    state.routes = {
        "/v1/models": models("m"),
        "/v1/routing/capabilities": lambda body: (200, {"supported": True}),
        "/v1/chat/completions": chat,
        "/v1/completions": completion,
        "/tokenize": tokenize,
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def answer(self, body: dict[str, Any]) -> None:
            state.asked.append((self.path, body))
            route = state.routes.get(self.path)
            status, wire = route(body) if route else error(404, "Not Found")
            data = json.dumps(wire).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()
