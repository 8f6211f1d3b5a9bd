"""Names in the sources of the next vLLM, of the classes that Sluice touches.

Its wheel has hundreds of megabytes, so what a test needs of it is in `NAMES`. To make that file
again, for this or another version, from tests/:

    pip download --no-deps vllm==VERSION
    python -m support.next_vllm vllm-VERSION-*.whl
"""

from __future__ import annotations

import inspect
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sluice.models.engine.runners.seams import BOTH, SCHEDULER, TELEMETRY, V1, V2
from sluice.models.vllm_adapter.patches.install import patches
from sluice.models.vllm_adapter.seams import Seam, names_in

NAMES = Path(__file__).with_name("next_vllm.json")


def vllm_folder() -> Path:
    """The running vLLM's sources."""
    import vllm

    return Path(vllm.__file__).parent


def all_seams() -> list[Seam]:
    """What the adapters of the runners and the scheduler use, and what the patches replace."""
    return [*BOTH, *TELEMETRY, *V1, *V2, *SCHEDULER, *_wrapped()]


def _wrapped() -> list[Seam]:
    seams: list[Seam] = []

    def note(owner: Any, name: str, make: Callable[..., Any]) -> None:
        file = Path(str(inspect.getsourcefile(owner))).relative_to(vllm_folder())
        module = isinstance(owner, ModuleType)
        seams.append(Seam(file.as_posix(), "" if module else owner.__name__, (name,)))

    for patch in patches():
        if not hasattr(patch, "wrap_once"):
            continue  # It sets options, and replaces nothing of vLLM's.
        stock, patch.wrap_once = patch.wrap_once, note
        try:
            patch.install()
        finally:
            patch.wrap_once = stock
    return seams


def moved_next() -> list[str]:
    """What the next vLLM no longer has."""
    known = json.loads(NAMES.read_text())["names"]
    found = {
        (file, owner): None if names is None else names.split()
        for file, owners in known.items()
        for owner, names in owners.items()
    }
    return [line for seam in all_seams() for line in seam.moved(found[seam.file, seam.owner])]


def main(wheel: Path) -> None:
    """Write `NAMES` from a wheel of vLLM."""
    names: dict[str, dict[str, str | None]] = {}
    with zipfile.ZipFile(wheel) as files:
        for seam in all_seams():
            path = f"vllm/{seam.file}"
            source = files.read(path).decode() if path in files.namelist() else None
            found = None if source is None else names_in(source, seam.owner)
            owners = names.setdefault(seam.file, {})
            owners[seam.owner] = None if found is None else " ".join(sorted(found))
    text = json.dumps({"vllm": wheel.name.split("-")[1], "names": names}, indent=1, sort_keys=True)
    NAMES.write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
