"""Both servers started, compared and stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from sluice.loadtest.comparison.__main__ import main
from sluice.loadtest.comparison.pairs import Comparison, Pairs
from sluice.models.offline.demo import DEMO_MODEL_DIR, DEMO_PROFILE_DIR


def test_the_demo_model_against_stock_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    routes: list[int] = []
    run = Comparison.run

    def seen(self: Comparison, stock: str, ours: str, say: Callable[[str], None]) -> list[Pairs]:
        routes.extend(httpx.get(f"{url}/v1/routing/presets").status_code for url in (stock, ours))
        return run(self, stock, ours, say)

    monkeypatch.setattr(Comparison, "run", seen)
    policies = {"half": {"depth": {"skip": {"blocks": [2, 3, 4, 5]}}}, "fast": {"preset": "fast"}}
    (tmp_path / "policies.json").write_text(json.dumps(policies))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "sort 3 1 2"}\n{"prompt": "count a a"}\n')
    out = tmp_path / "speed.json"
    status = main(
        [
            str(DEMO_MODEL_DIR),
            *("--policies", str(tmp_path / "policies.json")),
            *("--prompts", str(tmp_path / "prompts.jsonl")),
            *("--profile", str(DEMO_PROFILE_DIR)),
            *("--batch", "1", "2", "--tokens", "16"),
            "--serve-arguments=--enforce-eager",
            *("--out", str(out)),
        ]
    )
    assert status == 0
    found = json.loads(out.read_text())
    assert (found["mode"], found["tokens"], found["repeats"]) == ("eager", 16, 6)
    assert {"date", "machine", "versions"} < found.keys()
    rows = [(row["policy"], row["batch"]) for row in found["rows"]]
    assert rows == [(name, batch) for batch in (1, 2) for name in ("no routing", "half", "fast")]
    assert all(len(row["our_seconds"]) == 6 for row in found["rows"])
    assert routes == [404, 200]
    assert all((tmp_path / f"speed.{name}.log").stat().st_size for name in ("stock", "sluice"))


@pytest.mark.parametrize("routed", ["0", "2"])
def test_neighbours_are_some_of_every_batch(
    routed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--policies", "p", "--prompts", "p", "--out", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit):
        main(["m", *files, "--batch", "8", "2", "--routed", routed])
    assert "--routed must be above 0 and below every --batch" in capsys.readouterr().err


def test_a_refused_policy_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "policies.json").write_text("{")
    with pytest.raises(SystemExit):
        main(
            [
                str(DEMO_MODEL_DIR),
                *("--policies", str(tmp_path / "policies.json")),
                *("--prompts", str(tmp_path / "policies.json")),
                *("--out", str(tmp_path / "out.json")),
            ]
        )
    assert "Expecting property name" in capsys.readouterr().err
