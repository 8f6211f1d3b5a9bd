"""Compile every Triton kernel for CUDA; no GPU is needed for that, and none is asked.

The interpreter lets through what the compiler does not. A process of its own: Triton is told
whether to interpret when it is imported.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sluice.kernels.triton import (
    batch_budget,
    contrast_logits,
    exit_decision,
    kv_fill,
    layer_stats,
    route_topk,
    router_scores,
    row_compact,
)

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
    "policy_index": "*i32",
    "remix_index": "*i32",
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
    common = {"SIGMOID": grouped, "HAS_REMIX": True, "CORRECTED": grouped, **grouping, **sizes}
    build(
        route_topk._route,
        {
            **ROUTING,
            "stock_weights": "*fp32",
            "stock_ids": "*i32",
            "token_index": "*i64",
            "set_index": "*i32",
            "members": "*i1",
            "limits": "*i32",
            "cuts": "*fp32",
            "forced_weights": "*fp32",
            "histogram": "*i64",
            "by_token": "*i64",
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
        router_scores._score,
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


def typed(kernel: Any, constants: dict[str, Any], **types: str) -> dict[str, str]:
    """Types of all arguments but constants: strides and sizes are numbers unless said otherwise."""
    names = [parameter.name for parameter in kernel.params]
    return {name: types.get(name, "i32") for name in names if name not in constants}


def build_depth() -> None:
    """The kernels of exit tests and of rows that leave."""
    for pair in (True, False):
        constants = {"delta_column": 1, "residual_column": 1, "before_column": 1}
        constants |= {"PAIR": pair, "R": 2, "B": 512}
        streams = dict.fromkeys(("deltas", "residuals", "befores"), "*bf16")
        types = typed(layer_stats._compare, constants, **streams, stats="*fp32")
        build(layer_stats._compare, types, constants)
    answers = {"states": "*fp32", "thresholds": "*fp32", "stats": "*fp32", "decisions": "*i1"}
    for confident, parts in ((True, 8), (False, 1)):
        constants = {"column_stride": 1, "CONFIDENT": confident, "PARTS": parts, "PART": 4096}
        constants |= {"R": 1, "B": 1024}
        types = typed(exit_decision._read, constants, logits="*bf16", **answers)
        build(exit_decision._read, types, constants)
        constants = {"CONFIDENT": confident, "PARTS": 38, "R": 16, "P": 64}
        build(exit_decision._join, typed(exit_decision._join, constants, **answers), constants)
    for back in (True, False):
        states = ("delta", "residual", "delta_rows", "residual_rows")
        constants = {**{f"{name}_step": 1 for name in states}, "BACK": back, "R": 2, "H": 1024}
        types = typed(row_compact._copy, constants, **dict.fromkeys(states, "*bf16"), index="*i64")
        build(row_compact._copy, types, constants)
    held = dict.fromkeys(("key", "value", "key_cache", "value_cache", "norm_weight"), "*bf16")
    for neox, rotary in ((True, 128), (False, 64)):
        steps = ("key_step", "value_step", "key_cache_step", "value_cache_step")
        constants = dict.fromkeys(steps, 1) | {"HEAD": 128, "VALUE": 128, "ROTARY": rotary}
        constants |= {"NEOX": neox, "NORMED": neox, "N": 8, "P": rotary // 2, "V": 128}
        constants["Q"] = max(128 - rotary, 1)
        numbers = {"positions": "*i64", "slots": "*i64", "cos_sin": "*fp32", "eps": "fp32"}
        build(kv_fill._fill, typed(kv_fill._fill, constants, **held, **numbers), constants)


def build_contrast() -> None:
    """The three kernels of a contrast."""
    names = ("betas", "shares", "bests", "lowests")
    types = dict.fromkeys(names, "*fp32")
    types |= dict.fromkeys(("strong", "weak", "mixed_out"), "*bf16")
    for kernel in (contrast_logits._best, contrast_logits._lowest, contrast_logits._write):
        constants: dict[str, Any] = {"step": 1, "T": 4096}
        if kernel is not contrast_logits._best:
            constants |= {"weak_step": 1, "C": 16}
        build(kernel, typed(kernel, constants, **types), constants)


if __name__ == "__main__":
    build_routing(grouped=False)
    build_routing(grouped=True)
    build_budgets()
    build_depth()
    build_contrast()
