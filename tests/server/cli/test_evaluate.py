"""`sluice eval` against a running server: rows, warnings, and everything that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import run_command
from support.serving import Server

from sluice.models.offline.demo.evaluate import heldout_items
from sluice.models.offline.evaluate.choices import idle_controls
from sluice.server.cli.evaluate import add_parser


def evaluate(*arguments: str | Path) -> int | str | None:
    return run_command(add_parser, "eval", *arguments)


def asking(server: Server, tasks: Path, *policies: str) -> list[str | Path]:
    arguments = ["--url", f"{server.url}/v1", "--api-key", server.api_key, "--tasks", tasks]
    return [*arguments, *(part for policy in policies for part in ("--policy", policy))]


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Answers in a chat, answers behind a text, and choices of both."""
    lines: list[dict[str, Any]] = []
    for task, items in heldout_items(4, seed=3, tasks=("copy", "add", "max")).items():
        for item in items:
            line = {"answer": item.answer, "task": task}
            if task == "add":
                lines.append({**line, "text": f"<|user|>{item.prompt}<|assistant|>"})
            elif task == "copy":
                lines.append({**line, "messages": [{"role": "user", "content": item.prompt}]})
            else:
                choices = list(dict.fromkeys(item.prompt.split()[1:]))
                lines.append({**line, "prompt": item.prompt, "choices": choices})
    return write(tmp_path / "tasks.jsonl", *lines)


EXIT = '{"depth": {"exit": {"method": "confidence", "threshold": 0.0, "layers": [3]}}}'


def test_a_row_per_policy(
    server: Server, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    named = tmp_path / "named.json"
    named.write_text(json.dumps({"half": {"depth": {"skip": {"blocks": [4, 5, 6, 7]}}}}))
    arguments = asking(server, tasks, "none", f"@{named}", EXIT)
    assert evaluate(*arguments, "--json", file) == 0
    full, half, early = json.loads(file.read_text())
    assert [row["policy"] for row in (full, half, early)] == ["none", "half", EXIT]
    assert list(full["tasks"]) == ["copy", "add", "max"]
    assert full["tasks"] == {"copy": 1.0, "add": 1.0, "max": 1.0}
    assert full["interval"] == pytest.approx([0.7575, 1.0], abs=1e-4)
    assert full["intervals"]["max"] == pytest.approx([0.5101, 1.0], abs=1e-4)
    assert [row["mean_layers"] for row in (full, half, early)] == [8, 4, 4]
    # Half of the layers, and the LM head.
    assert full["compute_fraction"] == 1
    assert 0.5 < half["compute_fraction"] < 0.6
    assert 0.5 < early["compute_fraction"] < 1
    assert early["tasks"]["max"] == full["tasks"]["max"], "choices know nothing of exits"
    assert all(row["seconds_per_item"] > 0 < row["tokens_per_second"] for row in (full, half))
    assert "difference" not in full
    difference = half["difference"]
    wrong = sum(4 * (1 - half["tasks"][task]) for task in ("copy", "add", "max"))
    assert (difference["reference"], difference["gained"]) == ("none", 0)
    assert difference["lost"] == wrong
    assert difference["exact_match"]["value"] == pytest.approx(-wrong / 12)
    assert difference["faster"]["low"] <= difference["faster"]["value"]
    shown = capsys.readouterr()
    assert "95 %" not in shown.err
    # Not a terminal: no bars.
    assert "\x1b[" not in shown.err
    for text in ("half", "per token", "copy", "75.8-100.0", "against none"):
        assert text in shown.out
    (warning,) = [line for line in shown.err.splitlines() if line.startswith("warning")]
    assert f"policy {EXIT}: depth.exit acts on generated tokens only" in warning
    assert "4 of 12 items" in warning


def test_a_model_id_may_select_the_preset(
    server: Server, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "by-id.json", tmp_path / "by-name.json"]
    by_id = [*asking(server, tasks), "--model", "demo@leave-early"]
    by_name = asking(server, tasks, "leave-early")
    for arguments, file in zip((by_id, by_name), files, strict=True):
        assert evaluate(*arguments, "--json", file) == 0
    (first,), (second,) = (json.loads(file.read_text()) for file in files)
    assert first.pop("policy") == "demo@leave-early"
    assert second.pop("policy") == "leave-early"
    assert (first.pop("routing"), second.pop("routing")) == ({}, {"preset": "leave-early"})
    for row in (first, second):  # Requests overlap, so sums of floats come in any order.
        row["exit_layers"] = sorted(row["exit_layers"])
        del row["seconds_per_item"], row["tokens_per_second"]
    assert first == second
    assert "demo@leave-early: average exact match" in " ".join(capsys.readouterr().out.split())


def test_long_choices_lose_by_their_sum(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both begin with a token that the model does not expect: the long one goes on from there."""
    line = {"prompt": "sort 4 1 3 2 4", "choices": ["2 1 2 3 4", "2"], "answer": "2 1 2 3 4"}
    file, right = write(tmp_path / "tasks.jsonl", line), []
    for more in ((), ("--per-token",)):
        assert evaluate(*asking(server, file, "none"), *more) == 0
        right.append("1/1" in capsys.readouterr().out)
    client = server.client()
    sums, means = [], []
    for choice in line["choices"]:
        prompt = f"<|user|>{line['prompt']}<|assistant|>"
        asked: dict[str, Any] = {"max_tokens": 0, "echo": True, "logprobs": 0}
        answer = client.completions.create(model="demo", prompt=prompt + choice, **asked)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        behind = logprobs.token_logprobs[-len(choice) :]  # type: ignore[index]
        sums.append(sum(map(float, behind)))
        means.append(sums[-1] / len(choice))
    assert right == [sums[0] >= sums[1], means[0] >= means[1]]
    assert right == [False, True]


POLICIES: dict[str, dict[str, Any]] = {
    "skip": {"depth": {"skip": {"blocks": [2]}}},
    "skip, prompt": {"depth": {"skip": {"mlp": [2]}, "phase": "prefill"}},
    "skip, answer": {"depth": {"skip": {"blocks": [2]}, "phase": "decode"}},
    "effort": {"effort": 0.5},
    "exit": json.loads(EXIT),
    "fixed exit": {"depth": {"exit": {"method": "fixed", "layers": [3]}}},
    "mod": {"depth": {"adaptive": {"method": "mod"}}},
    "similarity": {"depth": {"adaptive": {"method": "similarity", "budget": 0.5}}},
    "lac, readout": {"depth": {"adaptive": {"method": "lac", "mode": "readout"}}},
    "lac, replace": {"depth": {"adaptive": {"method": "lac", "mode": "replace"}}},
    "lac, predict": {"depth": {"adaptive": {"method": "lac", "mode": "predict"}}},
    "top-k": {"experts": {"top_k": 1}},
    "mask": {"experts": {"deactivate": [{"layer": 2, "experts": [0, 1, 2, 3, 4, 5]}]}},
    "budget": {"experts": {"budget": {"method": "oea", "k0": 1}}},
    "contrast": {"experts": {"contrast": {"weak_rank": 1}}},
    "remix": {
        "experts": {
            "remix": {"method": "supplied", "pathway": [[1 / 16] * 16] * 5, "alpha": 0.0},
        }
    },
    "remix, answer": {
        "experts": {
            "remix": {
                "method": "supplied",
                "scope": "decode",
                "pathway": [[1 / 16] * 16] * 5,
                "alpha": 0.0,
            }
        }
    },
}


@pytest.mark.parametrize("name", POLICIES)
def test_idle_controls_change_nothing_and_others_do(server: Server, name: str) -> None:
    """What `idle_controls` says of a control holds of the engine."""

    def read(routing: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
        answer = server.client().completions.create(
            model="demo",
            prompt="<|user|>sort 4 1 3 2 4<|assistant|>4 3 2 1 1",
            max_tokens=0,
            echo=True,
            logprobs=0,
            extra_body={"routing": {**routing, "report": True}},
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        report: dict[str, Any] = answer.model_dump()["routing"]
        return [float(x) for x in (logprobs.token_logprobs or [])[-9:]], report

    stock, _ = read({})
    own, report = read(POLICIES[name])
    assert report["policy"], "the policy asks for something"
    if idle_controls(report["policy"]):
        assert own == pytest.approx(stock, abs=1e-3)
    else:
        assert own != pytest.approx(stock, abs=1e-1)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "a"', "2: not JSON"),
        ('{"prompt": "a"}', "2: answer: a task needs one"),
        ('{"answer": "a"}', "2: give one of text, prompt and messages"),
        ('{"prompt": "a", "answer": "b", "choices": ["c", "d"]}', "2: answer is none of"),
        ('{"prompt": "a", "answer": "b", "choice": ["b", "d"]}', "2: choice"),
    ],
)
def test_tasks_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, complaint: str
) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    assert evaluate("--url", "http://127.0.0.1:9/v1", "--tasks", file) == 2
    assert f"tasks.jsonl:{complaint}" in capsys.readouterr().err


URL = ("--url", "http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "give --url for a server, or --model FOLDER"),
        (URL, "no server answers"),
        ((*URL, "--policy", "{"), "not JSON"),
        ((*URL, "--policy", "a", "--policy", "a"), "given before"),
        ((*URL, "--model", "demo@a", "--policy", "b"), "not with both"),
        ((*URL, "--max-tokens", "0"), "--max-tokens must be at least 1"),
        ((*URL, "--concurrency", "0"), "--concurrency must be at least 1"),
        ((*URL, "--presets", "x.yaml"), "--presets does not go with --url"),
        ((*URL, "--profile", "x"), "--profile does not go with --url"),
        (("--model", "x", "--api-key", "k"), "--api-key needs --url"),
    ],
)
def test_arguments_that_do_not_fit(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    complaint: str,
) -> None:
    file = write(tmp_path / "tasks.jsonl", {"prompt": "a", "answer": "b"})
    assert evaluate("--tasks", file, *arguments) == 2
    assert complaint in capsys.readouterr().err


def test_no_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(*URL, "--tasks", tmp_path / "nowhere.jsonl") == 2
    assert "nowhere.jsonl: No such file" in capsys.readouterr().err


def test_a_refused_policy_is_named_with_its_field(
    server: Server, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "named.json"
    file.write_text(json.dumps({"deep": {"depth": {"skip": {"blocks": [3, 9]}}}}))
    assert evaluate(*asking(server, tasks, "none", f"@{file}", "light")) == 2
    shown = capsys.readouterr()
    assert "policy deep: routing.depth.skip.blocks.1: layer 9 does not exist" in shown.err
    assert "none: average exact match" in shown.out, "what was measured before is shown"


def test_a_preset_that_is_not_there(
    server: Server, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    assert evaluate(*asking(server, tasks, "fastest"), "--json", file) == 2
    assert "policy fastest: routing.preset: preset 'fastest'" in capsys.readouterr().err
    assert json.loads(file.read_text()) == []


def test_a_model_that_is_not_there(
    server: Server, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(*asking(server, tasks), "--model", "demo@fastest") == 2
    assert "not demo@fastest" in capsys.readouterr().err


def test_another_key(server: Server, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("--url", f"{server.url}/v1", "--tasks", tasks) == 2
    assert "another --api-key" in capsys.readouterr().err


@pytest.mark.parametrize("choices", [None, ["b", "c"]])
def test_a_prompt_over_the_context_names_its_line(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], choices: list[str] | None
) -> None:
    lines = [{"prompt": text, "answer": "b", "choices": choices} for text in ("a", "a" * 1100)]
    file = write(tmp_path / "tasks.jsonl", *lines)
    assert evaluate(*asking(server, file)) == 2
    assert "tasks.jsonl:2: This model's maximum context length" in capsys.readouterr().err


def test_answers_that_were_cut_off(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "tasks.jsonl", {"prompt": "copy abcdef", "answer": "abcdef"})
    assert evaluate(*asking(server, file), "--max-tokens", "3") == 0
    assert "1 of 1 answers were cut off after 3 tokens" in capsys.readouterr().err


def test_rows_that_cannot_be_written(
    server: Server, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nowhere" / "rows.json"
    assert evaluate(*asking(server, tasks, "none"), "--json", file) == 2
    shown = capsys.readouterr()
    assert "rows.json: No such file" in shown.err
    assert "none: average exact match" in shown.out
