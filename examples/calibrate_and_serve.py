"""Calibrate and serve: measure which layers matter, and let the server leave out the others.

Shows the way from a model folder to a profile to a request that only says how much to spend.
`sluice calibrate importance` is the cheapest of the steps: it reads a few prompts and ranks the
layers. `sluice calibrate` without a step runs all of them (docs/calibration.md).

    .venv/bin/python examples/calibrate_and_serve.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import openai
from serving import DATA, DEMO_MODEL, server

EFFORT = 0.75


def calibrate(profile: Path) -> None:
    """Write a profile of the demo model that holds the importance of its layers."""
    sluice = Path(sys.executable).parent / "sluice"
    prompts = ["--prompts", DATA / "tasks.jsonl"]
    # As little as will do: a real calibration takes the defaults and some hundred prompts.
    short = ["--new-tokens", "8", "--future-prompts", "2", "--dtype", "float32"]
    command = [sluice, "calibrate", "importance", DEMO_MODEL, *prompts, *short, "--out", profile]
    subprocess.run(command, check=True)


def main() -> None:
    """Calibrate, serve, and ask for three quarters of the model."""
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        calibrate(profile)
        arguments = ["--served-model-name", "mine", "--profile", str(profile)]
        cache = ["--kv-cache-memory-bytes", "256M"]
        with server(None, str(DEMO_MODEL), *arguments, *cache) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
            answer = client.chat.completions.create(
                model="mine",
                messages=[{"role": "user", "content": "max 45 43 60"}],
                temperature=0,
                extra_body={"routing": {"effort": EFFORT, "report": True}},
            )
    report = answer.model_extra["routing"]
    skipped = report["policy"]["depth"]["skip"]
    print(f"answer at effort {EFFORT}: {answer.choices[0].message.content}")
    print(f"attention left out in layers {skipped['attention']}, MLP in layers {skipped['mlp']}")
    print(f"compute of the answer: {report['generated']['compute_fraction']:.1%} of full depth's")


if __name__ == "__main__":
    main()
