"""Suites of the engine that run under several choices of `SLUICE_KERNELS`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from support.interpreter import v2

from sluice.kernels import dispatch
from sluice.kernels.dispatch import AUTO, REFERENCE, TRITON, VARIABLE, Operation

MARKERS = (
    "interpreted: of tests with the fixture `kernels`, also runs with Triton's interpreter",
    "family(name): of tests with the fixture `served`, runs with this family alone",
)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's `SERVED` families as they are, and its `CHOSEN` under the other choices too.

    With `INTERPRETED_FAMILIES` only those of them run with Triton's interpreter. V2 runs the first
    and the last of `CHOSEN` as they are: that runner is interpreted itself.
    """
    chosen = getattr(metafunc.module, "CHOSEN", None)
    if chosen is None or "served" not in metafunc.fixturenames:
        return
    settings = [(family, AUTO) for family in metafunc.module.SERVED]
    interpreted = getattr(metafunc.module, "INTERPRETED_FAMILIES", chosen)
    settings += [(family, REFERENCE) for family in chosen]
    settings += [(family, TRITON) for family in interpreted]
    only = metafunc.definition.get_closest_marker("family")
    if only is not None:
        settings = [(only.args[0], AUTO)]
    elif v2():
        settings = [(family, AUTO) for family in (chosen[0], chosen[-1])]
    metafunc.parametrize(("family", "kernels"), settings, indirect=["kernels"], scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what would run with Triton's interpreter and is not marked so.

    Interpreted, all of a family's tests take three times as long for depth and thirty times for
    routing. Marked are those that reach a kernel, one where several give it the same to do; exits
    of several requests side by side are in `test_kernel_choices.py` under every choice.
    """
    out = [item for item in items if not wanted(item)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


def wanted(item: pytest.Item) -> bool:
    params: dict[str, object] = getattr(getattr(item, "callspec", None), "params", {})
    if params.get("kernels") != TRITON:
        return True
    return item.get_closest_marker("interpreted") is not None


@pytest.fixture(scope="session", autouse=True)
def quick_engines() -> Iterator[None]:
    """Spare each engine what a process that starts dozens of them needs once.

    vLLM looks through all objects and all modules of the process at every start and end: three of
    the four seconds that a tiny model takes.
    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.engine import core

    gc.collect()
    gc.freeze()
    register = staticmethod(cache(CpuPlatform.register_triton_kernel_overrides))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "register_triton_kernel_overrides", register)
        patch.setattr(core, "freeze_gc_heap", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """What `SLUICE_KERNELS` says from before an engine starts: the parameter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, request.param)
        dispatch.chosen.cache_clear()
        yield request.param
    dispatch.chosen.cache_clear()


@pytest.fixture
def ran(kernels: str, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Operations that have run in this test, all of them under the choice of its engine."""
    names: set[str] = set()
    plain = Operation._run

    def run(operation: Operation[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert dispatch.chosen() == kernels
        names.add(operation.name)
        return plain(operation, *args, **kwargs)

    monkeypatch.setattr(Operation, "_run", run)
    return names
