"""What the examples share: `--url`, and a server for the time of a script without one."""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEMO_MODEL = Path(__file__).parents[1] / "models/offline/demo/weights"
DATA = Path(__file__).parent / "data"


def url_argument(description: str | None) -> str | None:
    """The value of `--url`, or None."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--url", help="server to ask, for example http://127.0.0.1:8000; default: start one"
    )
    url: str | None = parser.parse_args().url
    return url


@contextmanager
def server(url: str | None, *arguments: str) -> Iterator[str]:
    """`url`, or that of `sluice serve ARGUMENTS`, which is stopped at the end as by Ctrl-C.

    Raises:
        RuntimeError: the server did not start.
    """
    if url is not None:
        yield url.rstrip("/")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    sluice = Path(sys.executable).parent / "sluice"
    # Not every CPU has instructions for bfloat16, the type of the demo model's weights.
    command = [sluice, "serve", *arguments, "--enforce-eager", "--dtype", "float32", "--port", port]
    print("starting:", "sluice", *command[1:], file=sys.stderr)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            own = f"http://127.0.0.1:{port}"
            while not _answers(own):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start:\n{log.read()[-4000:]}")
                time.sleep(0.5)
            yield own
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False
