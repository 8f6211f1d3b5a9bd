"""Engines on vLLM's V2 model runner, in processes that run on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.interpreter import around_what_it_cannot_run, v2

collect_ignore = [] if v2() else ["test_v2.py"]


@pytest.fixture(scope="session", autouse=True)
def interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if v2():
            around_what_it_cannot_run(patch)
        yield


@pytest.fixture(scope="module", params=[False, True] if v2() else [False])
def overlapping(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether a step is scheduled before the one before has ended, as vLLM does on a GPU."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config

    def check(platform: Any, vllm_config: Any) -> None:
        stock(vllm_config)
        vllm_config.scheduler_config.async_scheduling = request.param

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check))
        yield request.param
