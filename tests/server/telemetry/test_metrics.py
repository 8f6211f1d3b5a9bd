"""`/metrics`: the series exist from zero, are clean, and agree with the reports."""

from __future__ import annotations

import json
import urllib.request
from importlib.metadata import version
from typing import Any

import openai
import pytest
from support.prometheus import promtool
from support.serving import Server

from sluice.models.routing.errors import REASONS

QUESTION = [{"role": "user", "content": "copy hello"}]


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 5, **options}
    )


def test_promtool_is_content(server: Server) -> None:
    ours = "".join(line + "\n" for line in server.metrics_text().splitlines() if "sluice_" in line)
    for name in (
        "sluice_build_info",
        "sluice_layer_tokens_total",
        "sluice_layer_utilization_ratio",
        "sluice_exit_tokens_total",
        "sluice_experts_active_mean",
        "sluice_expert_load_max_mean_ratio",
        "sluice_expert_masked_total",
        "sluice_effort_ratio_bucket",
        "sluice_request_compute_fraction_bucket",
        "sluice_requests_total",
        "sluice_policy_rejections_total",
    ):
        assert f"\n{name}{{" in ours
    check = promtool("check", "metrics", input=ours)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_the_versions_that_run(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/version", timeout=30) as response:
        vllm = json.load(response)["version"]
    lines = [line for line in server.metrics_text().splitlines() if "sluice_build_info" in line]
    assert lines == [
        "# HELP sluice_build_info Versions of Sluice and vLLM; always 1.",
        "# TYPE sluice_build_info gauge",
        f'sluice_build_info{{version="{version("vllm-sluice")}",vllm_version="{vllm}"}} 1.0',
    ]


def test_every_known_series_is_there(server: Server, client: openai.OpenAI) -> None:
    there = server.samples()
    presets = [entry["id"] for entry in client.get("/routing/presets", cast_to=dict)["data"]]
    assert {"shallow", "leave-early"} <= set(presets)
    for preset in ("none", "custom", *presets):
        for outcome in ("ok", "rejected", "error", "aborted"):
            assert key("sluice_requests_total", preset=preset, outcome=outcome) in there
    for reason in REASONS:
        assert key("sluice_policy_rejections_total", reason=reason) in there
    for layer in map(str, range(8)):
        where = {"engine": "0", "layer": layer}
        assert key("sluice_exit_tokens_total", **where) in there
        assert key("sluice_expert_masked_total", **where) in there
        for name in ("sluice_experts_active_mean", "sluice_expert_load_max_mean_ratio"):
            assert key(name, **where) in there
        for module in ("attention", "mlp"):
            assert key("sluice_layer_utilization_ratio", **where, module=module) in there


def test_vllms_own_series_are_there(server: Server) -> None:
    text = server.metrics_text()
    for name in ("vllm:num_requests_running", "vllm:generation_tokens_total", "http_requests"):
        assert name in text


def test_layer_tokens_agree_with_reports(server: Server, client: openai.OpenAI) -> None:
    before = server.samples()
    routings: list[Any] = [
        {"depth": {"skip": {"blocks": [2]}}, "report": True},
        {"depth": {"skip": {"attention": [1], "mlp": [7]}, "phase": "decode"}, "report": True},
        {"depth": {"skip": {"attention": [4]}, "phase": "prefill"}, "report": True},
        {"report": True},
    ]
    reports = [ask(client, extra_body={"routing": routing}).routing for routing in routings]
    plain = ask(client)
    cached = plain.usage.prompt_tokens_details
    plain_rows = plain.usage.prompt_tokens + plain.usage.completion_tokens - 1
    assert cached is None or not cached.cached_tokens
    after = server.samples()
    for layer in range(8):
        for module in ("attention", "mlp"):
            outcomes = ["executed", "skipped"] + ["filled"] * (module == "attention")
            for outcome in outcomes:
                series = key(
                    "sluice_layer_tokens_total",
                    engine="0",
                    layer=str(layer),
                    module=module,
                    outcome=outcome,
                )
                expected = sum(report["layers"][layer][module][outcome] for report in reports)
                expected += plain_rows * (outcome == "executed")
                assert after[series] - before[series] == expected, series


def test_exit_tokens_agree_with_reports(server: Server, client: openai.OpenAI) -> None:
    rule = {"method": "confidence", "threshold": 0.9, "layers": [2, 4]}
    routings: list[Any] = [
        {"depth": {"exit": rule}, "report": True},
        {"depth": {"exit": {**rule, "threshold": 0.0}}, "report": True},
        {"depth": {"exit": {"method": "fixed", "layers": [5]}}, "report": True},
        {"effort": 0.5, "report": True},
        {"report": True},
    ]
    before = server.samples()
    reports = [ask(client, extra_body={"routing": routing}).routing for routing in routings]
    plain = ask(client)
    after = server.samples()
    for layer in range(8):
        series = key("sluice_exit_tokens_total", engine="0", layer=str(layer))
        expected = sum(report["exits"][layer]["tokens"] for report in reports)
        expected += (plain.usage.completion_tokens - 1) * (layer == 7)
        assert after[series] - before[series] == expected, series
    assert sum(report["exits"][2]["tokens"] for report in reports) > 0


def test_the_effort_that_requests_ask_for(server: Server, client: openai.OpenAI) -> None:
    before = server.samples()
    ask(client, model="demo@light")
    ask(client, extra_body={"routing": {"effort": 0.35}})
    ask(client, extra_body={"routing": {"report": True}})
    with pytest.raises(openai.BadRequestError):
        ask(client, extra_body={"routing": {"effort": 0.01}})
    after = server.samples()
    wanted = {
        key("sluice_effort_ratio_count"): 2,
        key("sluice_effort_ratio_bucket", le="0.3"): 0,
        key("sluice_effort_ratio_bucket", le="0.4"): 1,
        key("sluice_effort_ratio_bucket", le="0.8"): 2,
    }
    assert {series: after[series] - before[series] for series in wanted} == wanted


def test_utilization_is_a_ratio_of_the_window(server: Server, client: openai.OpenAI) -> None:
    ask(client, extra_body={"routing": {"depth": {"skip": {"mlp": [6]}}}})
    samples = server.samples()
    ratio, other = (
        samples[key("sluice_layer_utilization_ratio", engine="0", layer=layer, module="mlp")]
        for layer in "60"
    )
    assert 0 <= ratio < other == 1


def test_requests_rejections_and_compute_fraction(server: Server, client: openai.OpenAI) -> None:
    before = server.samples()
    ask(client)
    ask(client, model="demo@shallow")
    ask(client, extra_body={"routing": {"depth": {"skip": {"blocks": [1]}}}})
    list(ask(client, extra_body={"routing": {"depth": {"skip": {"blocks": [1]}}}}, stream=True))
    with pytest.raises(openai.BadRequestError):
        ask(client, extra_body={"routing": {"depth": {"skip": {"blocks": [8]}}}})
    with pytest.raises(openai.BadRequestError):
        ask(client, model="demo@shallow", extra_body={"routing": {"effort": 0.5}})
    with pytest.raises(openai.BadRequestError):
        ask(client, max_tokens=-1)
    wanted = {
        key("sluice_requests_total", preset="none", outcome="ok"): 1,
        key("sluice_requests_total", preset="none", outcome="rejected"): 1,
        key("sluice_requests_total", preset="shallow", outcome="ok"): 1,
        key("sluice_requests_total", preset="custom", outcome="ok"): 2,
        key("sluice_requests_total", preset="custom", outcome="rejected"): 1,
        key("sluice_requests_total", preset="shallow", outcome="rejected"): 1,
        key("sluice_policy_rejections_total", reason="layer_out_of_range"): 1,
        key("sluice_policy_rejections_total", reason="unsupported_combination"): 1,
        key("sluice_request_compute_fraction_count"): 4,
        # Block 1 of 8 left out, twice: both fall between 0.8 and 0.9.
        key("sluice_request_compute_fraction_bucket", le="0.8"): 0,
    }
    after = server.samples()
    assert {series: after[series] - before[series] for series in wanted} == wanted


def test_a_client_that_leaves_is_counted_as_aborted(server: Server, client: openai.OpenAI) -> None:
    series = key("sluice_requests_total", preset="custom", outcome="aborted")
    before = server.samples()[series]
    stream = ask(
        client,
        stream=True,
        max_tokens=900,
        extra_body={"ignore_eos": True, "routing": {"depth": {"skip": {"mlp": [6]}}}},
    )
    next(iter(stream))
    stream.close()
    for _ in range(100):
        if server.samples()[series] > before:
            break
    assert server.samples()[series] == before + 1
