"""Tensor parallel: two ranks take the same decisions and give the tokens of one."""

from __future__ import annotations

from typing import Any

import pytest
from serving import Server, running_server

ROUTINGS: list[Any] = [
    None,
    {"depth": {"skip": {"blocks": [2], "mlp": [5]}}, "report": True},
    {"depth": {"skip": {"attention": [1, 4]}, "phase": "prefill"}, "report": True},
    {
        "depth": {"exit": {"method": "confidence", "threshold": 0.9, "layers": [1, 2, 3]}},
        "report": True,
    },
    {
        "depth": {"exit": {"method": "saturation", "threshold": 0.95, "kv": "recompute"}},
        "report": True,
    },
    {"depth": {"adaptive": {"method": "similarity", "budget": 0.6}}, "report": True},
    {"depth": {"adaptive": {"method": "lac", "mode": "replace"}}, "report": True},
]


def answers(server: Server) -> list[tuple[str, Any]]:
    client = server.client()
    found = []
    for routing in ROUTINGS:
        body = {"ignore_eos": True, **({"routing": routing} if routing else {})}
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "reverse abcdef"}],
            temperature=0,
            max_tokens=16,
            extra_body=body,
        )
        layers = answer.routing["layers"] if routing else None
        found.append((answer.choices[0].message.content, layers))
    return found


def test_two_ranks_answer_as_one(
    server: Server, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    log = tmp_path_factory.mktemp("tensor-parallel") / "log"
    arguments = ["--enforce-eager", "--dtype", "float32", "--tensor-parallel-size", "2"]
    with running_server(log, *arguments) as two_ranks:
        assert answers(two_ranks) == answers(server)
