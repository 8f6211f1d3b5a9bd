"""The recipe for EleutherAI's lm-eval, run as docs/lm-eval says, against our own command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import run_command
from support.serving import Server, running_server

from sluice.models.offline.demo import DEMO_MODEL_DIR
from sluice.server.cli.evaluate import add_parser

RECIPE = Path(__file__).parents[3] / "docs" / "lm-eval"
PRESET = "half-depth"
"""Of models/offline/demo/presets.yaml: it acts on prompts too, and gets some of the items wrong."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model with the presets that it ships with."""
    log = tmp_path_factory.mktemp("demo") / "log"
    with running_server(log, "--enforce-eager", "--dtype", "float32", api_key="a-key") as running:
        yield running


@pytest.fixture(scope="module")
def measured(demo: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm-eval says: `results`, and samples by task, each in the order of the file."""
    out = tmp_path_factory.mktemp("lm-eval")
    arguments = {
        "model": f"demo@{PRESET}",
        "base_url": f"{demo.url}/v1/completions",
        "tokenizer": str(DEMO_MODEL_DIR),
        "tokenizer_backend": "huggingface",
        "num_concurrent": "8",
        "max_length": "1024",
    }
    environment = {
        **os.environ,
        "OPENAI_API_KEY": demo.api_key,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(out / "cache"),
    }
    command = [str(Path(sys.executable).parent / "lm_eval"), "run"]
    command += ["--model", "local-completions", "--model_args"]
    command += [",".join(f"{key}={value}" for key, value in arguments.items())]
    command += ["--include_path", ".", "--tasks", "sluice_answer,sluice_choice"]
    command += ["--apply_chat_template", "--log_samples", "--output_path", str(out)]
    ran = subprocess.run(
        command, cwd=RECIPE, env=environment, capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    (results,) = out.rglob("results_*.json")
    found: dict[str, Any] = json.loads(results.read_text())["results"]
    for task in ("sluice_answer", "sluice_choice"):
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        found[task]["samples"] = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return found


def ours(demo: Server, tasks: Path, out: Path, preset: str) -> dict[str, Any]:
    """The row of `sluice eval` on the same file under the same preset."""
    arguments: list[str | Path] = ["eval", "--url", f"{demo.url}/v1", "--api-key", demo.api_key]
    arguments += ["--tasks", tasks, "--policy", preset, "--max-tokens", "48", "--json", out]
    assert run_command(add_parser, *arguments) == 0
    (row,) = json.loads(out.read_text())
    found: dict[str, Any] = row
    return found


@pytest.mark.parametrize(
    ("file", "task", "metric"),
    [
        ("answer.jsonl", "sluice_answer", "exact_match,stripped"),
        ("choice.jsonl", "sluice_choice", "acc,none"),
    ],
)
def test_lm_eval_and_ours_agree(
    demo: Server, measured: dict[str, Any], tmp_path: Path, file: str, task: str, metric: str
) -> None:
    row = ours(demo, RECIPE / file, tmp_path / "rows.json", PRESET)
    theirs = measured[task][metric]
    assert row["exact_match"] == pytest.approx(theirs, abs=1e-9)
    assert 0 < theirs < 1, "some are right and some wrong"
    full = ours(demo, RECIPE / file, tmp_path / "rows.json", "none")
    assert full["exact_match"] != theirs, "the model id did select the preset"
    samples = measured[task]["samples"]
    assert len(samples) == row["items"]["all"] == len((RECIPE / file).read_text().splitlines())


def test_both_read_the_same_tokens(demo: Server, measured: dict[str, Any]) -> None:
    """Sums of log probabilities in lm-eval's samples are the server's for the chat's own tokens."""
    sample = measured["sluice_choice"]["samples"][0]
    theirs = [float(response[0][0]) for response in sample["resps"]]
    client = demo.client()
    for choice, total in zip(sample["doc"]["choices"], theirs, strict=True):
        answer = client.completions.create(
            model=f"demo@{PRESET}",
            prompt=f"<|user|>{sample['doc']['prompt']}<|assistant|>{choice}",
            max_tokens=0,
            echo=True,
            logprobs=0,
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        behind = [float(each) for each in logprobs.token_logprobs[-len(choice) :]]
        assert sum(behind) == pytest.approx(total, abs=1e-3)
