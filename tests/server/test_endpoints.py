"""The table of paths against vLLM's own routes."""

from __future__ import annotations

from argparse import Namespace

import pytest

from sluice.server.endpoints import GENERATING, OPEN, ROUTED, TEXT, Kind, kind_of

MANAGING = {
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/fault_tolerance/apply",
    "/inference/v1/abort_requests",
    "/abort_requests",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/start_profile",
    "/stop_profile",
}


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("POST", "/v1/chat/completions", Kind.GENERATING),
        ("POST", "/invocations", Kind.GENERATING),
        ("GET", "/v1/chat/completions", Kind.READ),
        ("POST", "/v1/chat/completions/", Kind.GENERATING),
        ("POST", "/tokenize", Kind.TEXT),
        ("POST", "/v1/responses/resp_1/cancel", Kind.TEXT),
        ("GET", "/v1/models", Kind.READ),
        ("", "/v1/realtime", Kind.READ),
        ("POST", "/sleep", Kind.MANAGING),
        ("DELETE", "/anything", Kind.MANAGING),
        ("OPTIONS", "/anything", Kind.OPEN),
        ("GET", "/health", Kind.OPEN),
        ("GET", "/healthy", Kind.READ),
        ("GET", "/console/console.css", Kind.OPEN),
    ],
)
def test_kinds(method: str, path: str, kind: Kind) -> None:
    assert kind_of(method, path) is kind


def test_every_route_of_vllm_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that a newer vLLM adds must be put into a list, here or in the table."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    app = build_app(args, ("generate", "render"))
    posts = {
        route.path for route in app.routes if "POST" in (getattr(route, "methods", None) or ())
    }
    assert posts >= ROUTED
    unknown = posts - GENERATING - TEXT - OPEN - MANAGING
    assert unknown == {"/v1/responses/{response_id}/cancel"}
