"""Load test: a short mix of policies, and what each did to latency and throughput.

Shows a scenario file, `data/scenario.yaml`, played by `sluice loadtest`, and how to read the report
that it writes (docs/load.md). Needs the extra `loadtest`.

    .venv/bin/python examples/load_test.py [--url http://127.0.0.1:8000]
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from serving import DATA, server, url_argument


def main() -> None:
    """Play the scenario and print a line for each policy."""
    with tempfile.TemporaryDirectory() as folder, server(url_argument(__doc__)) as url:
        scenario = DATA / "scenario.yaml"
        sluice = Path(sys.executable).parent / "sluice"
        command = [sluice, "loadtest", scenario, "--url", url, "--out", folder]
        # Exit status 1 is a bar that was missed: the report says which.
        subprocess.run(command, cwd=folder, check=False)
        report = Path(folder) / "scenario"
        with (report / "report.csv").open() as table:
            rows = list(csv.DictReader(table))
        verdicts = json.loads((report / "report.json").read_text())["verdicts"]
    for row in rows:
        first = float(row["ttft_ms_p50"])
        print(f"{row['policy']:12} {row['answered']:>3} answered, first token after {first:.0f} ms")
    print("bars missed:", [each["bar"] for each in verdicts if not each["met"]])


if __name__ == "__main__":
    main()
