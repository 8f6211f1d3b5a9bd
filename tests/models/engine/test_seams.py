"""What Sluice uses of vLLM's runners is in the running vLLM, and in the next one."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.next_vllm import all_seams, moved_next, vllm_folder

from sluice.models.engine.runners.base import check_seams
from sluice.models.vllm_adapter import seams
from sluice.models.vllm_adapter.patching import SeamMovedError
from sluice.models.vllm_adapter.seams import Seam


def test_the_running_vllm_has_it_all() -> None:
    assert seams.moved(vllm_folder(), all_seams()) == []


def test_the_next_vllm_has_it_all() -> None:
    assert moved_next() == []


def test_what_moved_is_named(tmp_path: Path) -> None:
    (tmp_path / "runner.py").write_text(
        "class Runner(Base):\n"
        "    field: int\n"
        "    constant = 1\n"
        "    def __init__(self):\n"
        "        self.attribute: int = 0\n"
        "        self.first, other.second = 1, 2\n"
        "    def method(self): ...\n"
        "def function(): ...\n"
    )
    has = ("field", "constant", "attribute", "first", "method")
    assert seams.moved(tmp_path, [Seam("runner.py", "Runner", has)]) == []
    assert seams.moved(tmp_path, [Seam("runner.py", "", ("Runner", "function"))]) == []
    assert seams.moved(
        tmp_path,
        [
            Seam("runner.py", "Runner", ("second", "method", "function")),
            Seam("runner.py", "", ("method",)),
            Seam("runner.py", "Other", ("method",)),
            Seam("other.py", "Runner", ("method",)),
        ],
    ) == [
        "`second` on Runner in runner.py",
        "`function` on Runner in runner.py",
        "`method` on the module in runner.py",
        "Other in runner.py",
        "Runner in other.py",
    ]


def test_a_start_names_what_moved() -> None:
    check_seams((Seam("v1/request.py", "Request", ("num_tokens",)),))
    with pytest.raises(SeamMovedError, match=r"has no Runner in runner\.py"):
        check_seams((Seam("runner.py", "Runner", ("method",)),))
