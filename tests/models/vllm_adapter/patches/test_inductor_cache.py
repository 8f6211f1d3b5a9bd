"""With our patches a compiled function is right whatever CPU the cache comes from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor import config
from torch._inductor.cpu_vec_isa import pick_vec_isa

from sluice.models.vllm_adapter.patches import inductor_cache
from sluice.models.vllm_adapter.patches.inductor_cache import vector_bits

MASKED = """
import torch

from sluice.models.vllm_adapter.patches.inductor_cache import install

install()
ids = torch.arange(64)
compiled = torch.compile(lambda ids: torch.where((ids >= 16) & (ids < 48), ids - 16, 0).float())
inside = torch.arange(32.0)
torch.testing.assert_close(compiled(ids), torch.cat([torch.zeros(16), inside, torch.zeros(16)]))
"""


def test_what_another_cpu_compiled_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    for capability in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}, {"ATEN_CPU_CAPABILITY": "default"}):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        environment.pop("ATEN_CPU_CAPABILITY", None)
        script = [sys.executable, "-c", MASKED]
        subprocess.run(script, env={**environment, **capability}, cwd=tmp_path, check=True)


def test_the_width_is_inductors_own() -> None:
    with config.patch({"cpp.simdlen": None}):
        own = pick_vec_isa()
        inductor_cache.install()
        assert config.cpp.simdlen == vector_bits(torch.backends.cpu.get_cpu_capability())
        assert pick_vec_isa() == own


def test_a_width_that_was_set_stays() -> None:
    with config.patch({"cpp.simdlen": 128}):
        inductor_cache.install()
        assert config.cpp.simdlen == 128


def test_where_pytorch_does_not_say_it_is_inductors_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert vector_bits("SVE256") is None
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert vector_bits("DEFAULT") is None
