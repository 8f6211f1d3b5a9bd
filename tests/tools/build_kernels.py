"""Compile every Triton kernel for CUDA; no GPU is needed for that, and none is asked.

The interpreter lets through what the compiler does not. A process of its own: Triton is told
whether to interpret when it is imported.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sluice.kernels.gpu import batch_budget, route_topk

ARCHITECTURES = (80, 90)


def build(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> None:
    """Compile one kernel.

    Args:
        kernel: a `triton.jit` function.
        types: of its arguments, as Triton names them, without those that are constants.
        constants: values of the others.
    """
    names = [parameter.name for parameter in kernel.params]
    assert set(names) == types.keys() | constants.keys(), set(names) ^ (types.keys() | {*constants})
    signature = {name: types.get(name, "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    for architecture in ARCHITECTURES:
        built = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        assert "ld.global" in built.asm["ptx"]
    print(kernel.__module__, kernel.__name__)


ROUTING = {
    "logits": "*bf16",
    "row_stride": "i64",
    "policies": "*i32",
    "pulls": "*i32",
    "references": "*fp32",
    "alphas": "*fp32",
    "tops": "*i32",
    "biases": "*fp32",
    "marks": "*u8",
    "corrections": "*fp32",
    "rows": "i32",
}


def build_routing(*, grouped: bool) -> None:
    """The routing kernels with everything that a step can ask."""
    grouping = {"GROUPS": 8, "TOPK_GROUP": 4} if grouped else {"GROUPS": 1, "TOPK_GROUP": 1}
    sizes = {"EXPERTS": 64, "R": 4, "E": 64}
    common = {"SIGMOID": grouped, "HAS_PULLS": True, "CORRECTED": grouped, **grouping, **sizes}
    build(
        route_topk._route,
        {
            **ROUTING,
            "stock_weights": "*fp32",
            "stock_ids": "*i32",
            "owners": "*i64",
            "sets": "*i32",
            "within": "*i1",
            "limits": "*i32",
            "cuts": "*fp32",
            "forced_weights": "*fp32",
            "histogram": "*i64",
            "ran": "*i64",
            "weights_out": "*fp32",
            "ids_out": "*i32",
            "scale": "fp32",
            "width": "i32",
        },
        {
            **common,
            "column_stride": 1,
            "TOP_K": 8,
            "RENORMALIZE": True,
            "REPEAT": grouped,
            "HAS_STOCK": True,
            "HAS_SETS": True,
            "HAS_TOKENS": True,
            "S": 16,
            "U": 8,
        },
    )
    build(
        route_topk._score,
        {**ROUTING, "scores_out": "*fp32", "choice_out": "*fp32"},
        {**common, "column_stride": 1},
    )


def build_budgets() -> None:
    """One kernel per method."""
    for method in range(3):
        build(
            batch_budget._share,
            {
                "choices": "*fp32",
                "scores": "*fp32",
                "members_out": "*i1",
                "rows": "i32",
                "size": "i32",
            },
            {"IS_OEA": method == 0, "IS_LYNX": method == 2, "EXPERTS": 61, "R": 16, "E": 64},
        )


if __name__ == "__main__":
    build_routing(grouped=False)
    build_routing(grouped=True)
    build_budgets()
    sys.exit(0)
