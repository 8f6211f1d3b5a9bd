"""Exits, efforts and masks that the model decides, through the official client."""

from __future__ import annotations

import itertools
from typing import Any

import openai
import pytest

LAYERS = 8
QUESTION = [{"role": "user", "content": "sort 4 1 9 3 7 2"}]
AT_ONCE = {"method": "confidence", "threshold": 0.0}
"""Every token leaves at the first exit."""


def ask(client: openai.OpenAI, routing: Any = None, model: str = "demo", **options: Any) -> Any:
    settings = {"messages": QUESTION, "temperature": 0, "max_tokens": 12}
    extra = {} if routing is None else {"routing": {**routing, "report": True}}
    return client.chat.completions.create(model=model, extra_body=extra, **{**settings, **options})


def exiting(**fields: Any) -> dict[str, Any]:
    return {"depth": {"exit": fields}}


def exits(report: dict[str, Any]) -> dict[int, int]:
    return {entry["layer"]: entry["tokens"] for entry in report["exits"] if entry["tokens"]}


def generated_rows(answer: Any) -> int:
    """Generated tokens that went through the model: all but the last."""
    return int(answer.usage.completion_tokens - 1)


def test_every_layer_is_in_the_report(client: openai.OpenAI) -> None:
    answer = ask(client, {})
    report = answer.routing
    assert [entry["layer"] for entry in report["exits"]] == [*range(LAYERS)]
    assert exits(report) == {LAYERS - 1: generated_rows(answer)}
    assert report["generated"] == {
        "tokens": generated_rows(answer),
        "mean_layers": LAYERS,
        "compute_fraction": 1,
    }
    assert report["compute_fraction"] == 1
    assert report["policy"] == {}


@pytest.mark.parametrize("kv", ["propagate", "recompute"])
def test_all_tokens_leave_at_the_first_exit(client: openai.OpenAI, kv: str) -> None:
    answer = ask(client, exiting(**AT_ONCE, layers=[5, 3], kv=kv))
    report, tokens = answer.routing, generated_rows(answer)
    assert exits(report).keys() <= {3, LAYERS - 1}
    assert sum(exits(report).values()) == report["generated"]["tokens"] == tokens
    assert exits(report)[3] > 0
    assert report["policy"]["depth"]["exit"] == {**AT_ONCE, "layers": [3, 5], "kv": kv}
    prompt = answer.usage.prompt_tokens
    assert all(layer["mlp"]["executed"] >= prompt for layer in report["layers"])
    if kv == "recompute":
        assert not any(layer["attention"]["filled"] for layer in report["layers"])
    else:
        assert exits(report) == {3: tokens}
        assert report["generated"]["mean_layers"] == 4
        assert report["layers"][3]["attention"]["executed"] == prompt + tokens
        assert report["layers"][4]["attention"] == {
            "executed": prompt,
            "skipped": 0,
            "filled": tokens,
        }
        assert report["generated"]["compute_fraction"] < report["compute_fraction"] < 1


def test_exits_differ_by_token_and_stay_at_their_layers(client: openai.OpenAI) -> None:
    rule = {"method": "confidence", "threshold": 0.9, "layers": [1, 3, 5]}
    answer = ask(client, exiting(**rule))
    found = exits(answer.routing)
    assert found.keys() <= {1, 3, 5, 7}
    assert sum(found.values()) == generated_rows(answer)
    layers = sum((layer + 1) * tokens for layer, tokens in found.items())
    mean = answer.routing["generated"]["mean_layers"]
    assert mean == pytest.approx(layers / generated_rows(answer), abs=1e-6)


def test_a_threshold_out_of_reach_is_full_depth(client: openai.OpenAI) -> None:
    full = ask(client)
    answer = ask(client, exiting(method="saturation", threshold=1.0, layers=[0]))
    assert answer.choices[0].message.content == full.choices[0].message.content
    assert exits(answer.routing) == {LAYERS - 1: generated_rows(answer)}


def test_a_stream_of_exits_is_the_whole_answer_and_its_report(client: openai.OpenAI) -> None:
    rule = exiting(method="entropy", threshold=0.5, min_layer=2)
    whole = ask(client, rule)
    *parts, last = ask(client, rule, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert last.routing == whole.routing
    assert not any(hasattr(part, "routing") for part in parts)


@pytest.mark.parametrize(
    "rule",
    [
        {"method": "patience", "patience": 2},
        {"method": "saturation", "threshold": 0.95, "decay": 4},
    ],
)
def test_other_exits(client: openai.OpenAI, rule: dict[str, Any]) -> None:
    answer = ask(client, exiting(**rule))
    assert sum(exits(answer.routing).values()) == generated_rows(answer)


def test_a_fixed_exit_is_a_skip_set(client: openai.OpenAI) -> None:
    fixed = ask(client, exiting(method="fixed", layers=[5]))
    named = ask(client, {"depth": {"skip": {"blocks": [6, 7]}}})
    assert fixed.routing == named.routing
    assert fixed.choices[0].message.content == named.choices[0].message.content
    assert exits(fixed.routing) == {5: generated_rows(fixed)}


def test_a_fraction_leaves_out_that_many(client: openai.OpenAI) -> None:
    report = ask(client, {"depth": {"skip": {"fraction": 0.25, "by": "attention"}}}).routing
    policy = report["policy"]["depth"]["skip"]
    assert (len(policy["attention"]), policy["mlp"]) == (2, [])


def test_effort_alone_leaves_out_its_blocks(client: openai.OpenAI) -> None:
    answer = ask(client, {"effort": 0.75})
    policy = answer.routing["policy"]["depth"]
    assert policy["elastic"]
    assert policy["phase"] == "decode"
    assert len(policy["skip"]["attention"]) == 2
    assert answer.routing["generated"]["mean_layers"] == 6
    assert ask(client, {}, model="demo@light").routing == answer.routing


def test_efforts_are_one_below_the_other(client: openai.OpenAI) -> None:
    asked = [ask(client, {"effort": effort}).routing for effort in (1, 0.75, 0.5, 0.25)]
    assert [report["generated"]["mean_layers"] for report in asked] == [8, 6, 4, 2]
    left_out = [
        set(report["policy"].get("depth", {}).get("skip", {}).get("mlp", [])) for report in asked
    ]
    assert all(less < more for less, more in itertools.pairwise(left_out))


def test_a_mask_from_the_prompt_holds_for_the_answer(client: openai.OpenAI) -> None:
    answer = ask(client, {"depth": {"adaptive": {"method": "similarity", "budget": 0.75}}})
    report, tokens = answer.routing, generated_rows(answer)
    mask = report["mask"]
    assert mask["attention"] == mask["mlp"]
    assert len(mask["mlp"]) == 2
    for layer in report["layers"]:
        skipped = tokens if layer["layer"] in mask["mlp"] else 0
        assert layer["mlp"]["skipped"] == skipped
    assert report["generated"]["mean_layers"] == 6


def test_token_capacity_thins_the_prompt_only(client: openai.OpenAI) -> None:
    retention = [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    answer = ask(client, {"depth": {"adaptive": {"method": "mod", "retention": retention}}})
    report, prompt = answer.routing, answer.usage.prompt_tokens
    for layer, share in zip(report["layers"], retention, strict=True):
        passed = prompt - int(share * prompt)
        assert layer["attention"]["filled"] == passed
        assert layer["mlp"]["skipped"] == passed
    assert exits(report) == {LAYERS - 1: generated_rows(answer)}
    assert "mask" not in report


@pytest.mark.parametrize("mode", ["readout", "replace", "predict"])
def test_lac(client: openai.OpenAI, mode: str) -> None:
    answer = ask(client, {"depth": {"adaptive": {"method": "lac", "mode": mode}}})
    rule = {"method": "lac", "mode": mode, "threshold": 0.8}
    assert answer.routing["policy"] == {"depth": {"adaptive": rule}}
    assert ("mask" in answer.routing) == (mode == "predict")
    if mode == "readout":
        assert answer.routing["compute_fraction"] == 1


def test_samples_of_one_request_are_summed(client: openai.OpenAI) -> None:
    answer = ask(client, exiting(**AT_ONCE, layers=[3]), n=3, temperature=1.0, seed=1)
    assert exits(answer.routing) == {3: answer.usage.completion_tokens - 3}
