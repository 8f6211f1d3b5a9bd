"""vLLM's V2 model runner on a CPU: its kernels run in Triton's interpreter.

vLLM wants a backend of Triton for CPUs, which the pinned Triton has not. The interpreter needs
none, so a stand-in for one is enough. It must be there before vLLM is imported, and holds for the
process: vLLM decides by it on import.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

RUNNER_ENV = "VLLM_USE_V2_MODEL_RUNNER"


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


def v2() -> bool:
    """Whether this process's engines run on the V2 runner."""
    return os.environ.get(RUNNER_ENV) == "1"


def stand_in_for_a_backend() -> None:
    """Have vLLM find Triton usable."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    from triton.backends import backends

    cast(dict[str, Any], backends)["cpu"] = SimpleNamespace(driver=_Driver, compiler=None)


def around_what_it_cannot_run(patch: pytest.MonkeyPatch) -> None:
    """Two kernels of vLLM's sampler that the interpreter fails on."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    from vllm.v1.sample.ops import topk_topp_sampler

    # A range over rows gives it plain integers. vLLM has a form without Triton.
    patch.setattr(topk_topp_sampler, "HAS_TRITON", False)
    store = InterpreterBuilder.create_masked_store

    def with_bool_mask(builder: Any, ptrs: Any, value: Any, mask: Any, cache: Any) -> Any:
        mask = TensorHandle(mask.data.astype(bool), mask.dtype)
        return store(builder, ptrs, value, mask, cache)

    patch.setattr(InterpreterBuilder, "create_masked_store", with_bool_mask)
