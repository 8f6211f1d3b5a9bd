"""A process with our patches runs vLLM's experts kernel for this CPU, before oneDNN has run."""

from __future__ import annotations

import subprocess
import sys

EXPERTS_KERNEL = """
import torch
from vllm import _custom_ops as ops

from sluice.models.vllm_adapter.patches.install import register

register()
isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
tokens, experts, hidden, width = 5, 4, 64, 32
states = torch.randn(tokens, hidden).bfloat16()
up = torch.randn(experts, 2 * width, hidden).bfloat16() / 8
down = torch.randn(experts, hidden, width).bfloat16() / 8
out = torch.empty_like(states)
ops.cpu_fused_moe(
    out,
    states,
    ops.cpu_prepack_moe_weight(up, isa),
    ops.cpu_prepack_moe_weight(down, isa),
    None,
    None,
    torch.ones(tokens, 1),
    torch.full((tokens, 1), 2, dtype=torch.int32),
    "silu",
    isa,
)
gate, value = (states.float() @ up[2].float().T).chunk(2, dim=1)
expected = torch.nn.functional.silu(gate) * value @ down[2].float().T
torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
"""


def test_an_experts_kernel_runs_first() -> None:
    run = subprocess.run(
        [sys.executable, "-c", EXPERTS_KERNEL], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
