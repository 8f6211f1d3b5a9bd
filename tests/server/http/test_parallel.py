"""Tensor parallel: two ranks take the same decisions and give the tokens of one."""

from __future__ import annotations

from typing import Any

import pytest
from support.serving import Server, running_server

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
    {"experts": {"top_k": 1, "protect_super_experts": False}, "report": True},
    {"experts": {"deactivate": [{"layer": 3, "experts": [0, 2, 7, 11]}]}, "report": True},
    {
        "experts": {
            "activate": [{"layer": 4, "experts": [5]}],
            "bias": [{"layer": 2, "expert": 9, "value": 0.2}],
            "skip_ratio": 0.4,
            "top_p": 0.8,
        },
        "report": True,
    },
    {"experts": {"budget": {"method": "oea", "k0": 1}}, "report": True},
    {
        "experts": {
            "remix": {
                "method": "supplied",
                "layers": [4],
                "pathway": [[1] * 8 + [3] * 8],
                "alpha": 0,
            }
        },
        "report": True,
    },
    {"experts": {"contrast": {"weak_rank": 1}}, "report": True},
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
        parts = answer.routing if routing else {}
        ran = parts.get("layers"), parts.get("experts")
        assert (ran[1] is not None) == (routing is not None and "experts" in routing)
        found.append((answer.choices[0].message.content, ran))
    return found


def test_two_ranks_answer_as_one(
    server: Server, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    log = tmp_path_factory.mktemp("tensor-parallel") / "log"
    arguments = ["--enforce-eager", "--dtype", "float32", "--tensor-parallel-size", "2"]
    with running_server(log, *arguments) as two_ranks:
        assert answers(two_ranks) == answers(server)
