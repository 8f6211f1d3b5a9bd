"""Without `--console` there is no console."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest
from support.serving import Server

from sluice.server.cli.serve import build_parser


@pytest.mark.parametrize("path", ["/console", "/console/", "/console/main.js"])
def test_a_server_without_the_flag_has_no_page(server: Server, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server.url}{path}", timeout=30)
    assert refused.value.code == 404


def test_the_flag_is_off_unless_given() -> None:
    parser = build_parser()
    assert parser.parse_args([]).console is False
    assert parser.parse_args(["--console"]).console is True
