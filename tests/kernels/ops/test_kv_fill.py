"""Keys and values of rows into their slots, against complex numbers turned one by one."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from support.poison import poisoned_memory

from sluice.kernels.dispatch import AUTO, REFERENCE, TRITON
from sluice.kernels.ops.kv_fill import kv_fill

EPS = 1e-5
POSITIONS = 50
EMPTY = 123.0
"""What no slot is given by any test."""
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

implementations = pytest.mark.parametrize("choice", [AUTO, REFERENCE, TRITON])
pairings = pytest.mark.parametrize("neox", [True, False], ids=["halves", "neighbours"])
norms = pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])


@dataclass(frozen=True)
class Shape:
    rows: int
    heads: int
    head: int
    rotary: int
    value: int
    block: int = 4


GRID = [
    pytest.param(Shape(1, 1, 2, 2, 2), id="one row, one head, one pair"),
    pytest.param(Shape(7, 2, 32, 32, 32, block=16), id="the usual"),
    pytest.param(Shape(5, 3, 20, 12, 20), id="odd heads, a part of the head turns"),
    pytest.param(Shape(3, 5, 10, 10, 6, block=1), id="values of another size, blocks of one"),
    pytest.param(Shape(3, 9, 130, 6, 130), id="more heads than a program has"),
    pytest.param(Shape(13, 1, 6, 6, 6, block=3), id="prime rows, blocks of three"),
    pytest.param(Shape(0, 2, 4, 4, 4), id="no rows"),
]
LAYOUTS = ["NHD", "HND", "apart"]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def caches(layout: str, blocks: int, shape: Shape, dtype: torch.dtype) -> list[torch.Tensor]:
    """As vLLM lays them out: keys and values of a head together; or two tensors of their own."""
    if layout == "apart":
        sizes = (blocks, shape.block, shape.heads)
        return [torch.full((*sizes, n), EMPTY, dtype=dtype) for n in (shape.head, shape.value)]
    width = shape.head + shape.value
    whole = torch.full((blocks, shape.heads, shape.block, width), EMPTY, dtype=dtype)
    if layout == "NHD":
        whole = whole.transpose(1, 2).contiguous().transpose(1, 2)
    return list(whole.transpose(1, 2).split([shape.head, shape.value], dim=-1))


def table(rotary: int) -> torch.Tensor:
    """Cosines, then sines; of a rotary embedding that also stretches, as YaRN does."""
    speeds = 0.3 ** torch.arange(rotary // 2)
    angles = torch.arange(POSITIONS).unsqueeze(1) * speeds
    return 1.1 * torch.cat([angles.cos(), angles.sin()], dim=-1)


def expected_key(
    key: list[float], angles: list[float], weight: list[float], neox: bool
) -> list[float]:
    """One head of one row."""
    if weight:
        mean = sum(number * number for number in key) / len(key)
        key = [number / math.sqrt(mean + EPS) * w for number, w in zip(key, weight, strict=True)]
    half = len(angles) // 2
    turned = list(key)
    for i in range(half):
        one, two = (i, i + half) if neox else (2 * i, 2 * i + 1)
        number = complex(key[one], key[two]) * complex(angles[i], angles[i + half])
        turned[one], turned[two] = number.real, number.imag
    return turned


def check(
    choice: str,
    shape: Shape,
    *,
    neox: bool = True,
    normed: bool = True,
    layout: str = "NHD",
    dtype: torch.dtype = torch.float32,
    silent: bool = True,
    packed: bool = True,
) -> None:
    rng = random.Random(f"{shape} {neox}")
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    rows, heads = shape.rows, shape.heads
    blocks = rows // shape.block + 3
    # Both as projected: neighbours in one row of a wider tensor.
    wide = torch.randn(rows, 3 + heads * (shape.head + shape.value), generator=generator).to(dtype)
    widths = [3, heads * shape.head, heads * shape.value]
    key, value = (part.unflatten(-1, (heads, -1)) for part in wide.split(widths, dim=-1)[1:])
    if not packed:
        key, value = key.transpose(0, 2).contiguous().transpose(0, 2), value.mT.contiguous().mT
    slots = rng.sample(range(blocks * shape.block), rows)
    if silent:
        slots = [-1 if row % 3 == 1 else slot for row, slot in enumerate(slots)]
    positions = [rng.randrange(POSITIONS) for _ in range(rows)]
    weight = torch.rand(shape.head if normed else 0, generator=generator).add(0.5).to(dtype)
    cos_sin = table(shape.rotary).to(dtype)
    into = caches(layout, blocks, shape, dtype)
    places, targets = (torch.tensor(n, dtype=torch.int64) for n in (positions, slots))
    inputs = (key, value, places, cos_sin, targets, weight)
    before = [part.clone() for part in inputs]
    fill = kv_fill.implementation("cpu", choice)
    fill(*inputs[:5], *into, weight, EPS, neox)
    assert all(torch.equal(part, old) for part, old in zip(inputs, before, strict=True))

    written = {slot: row for row, slot in enumerate(slots) if slot >= 0}
    angles, weights = cos_sin.double().tolist(), weight.double().tolist()
    for slot in range(blocks * shape.block):
        keys, values = (part[slot // shape.block, slot % shape.block] for part in into)
        if slot not in written:
            assert (keys == EMPTY).all(), "a slot nobody owns was written"
            assert (values == EMPTY).all()
            continue
        row = written[slot]
        assert torch.equal(values, value[row]), "values go in as they are"
        for head in range(heads):
            own = key[row, head].double().tolist()
            wanted = expected_key(own, angles[positions[row]], weights, neox)
            torch.testing.assert_close(
                keys[head].double(),
                torch.tensor(wanted, dtype=torch.float64),
                rtol=TOLERANCES[dtype],
                atol=TOLERANCES[dtype] / 10,
            )


@implementations
@pairings
@norms
@pytest.mark.parametrize("shape", GRID)
def test_shapes(choice: str, shape: Shape, neox: bool, normed: bool) -> None:
    check(choice, shape, neox=neox, normed=normed)


@implementations
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_layouts_and_dtypes(choice: str, layout: str, dtype: torch.dtype) -> None:
    check(choice, Shape(5, 3, 16, 8, 16), layout=layout, dtype=dtype)


@implementations
@pairings
def test_rows_that_are_strided_throughout(choice: str, neox: bool) -> None:
    check(choice, Shape(4, 3, 8, 8, 6), neox=neox, packed=False)


@implementations
def test_caches_that_lie_in_memory_unlike_each_other(choice: str) -> None:
    check(choice, Shape(6, 2, 8, 8, 5), layout="apart", silent=False)


@implementations
def test_every_row_writes(choice: str) -> None:
    check(choice, Shape(8, 2, 8, 8, 8), silent=False)


@implementations
def test_no_row_writes(choice: str) -> None:
    shape = Shape(3, 2, 8, 8, 8)
    key, value = torch.randn(2, 3, 2, 8)
    into = caches("NHD", 2, shape, torch.float32)
    slots, positions = torch.full((3,), -1), torch.zeros(3, dtype=torch.int64)
    fill = kv_fill.implementation("cpu", choice)
    fill(key, value, positions, table(8), slots, *into, torch.ones(8), EPS, True)
    assert all((part == EMPTY).all() for part in into)


@implementations
def test_a_key_of_zeros_stays_one(choice: str) -> None:
    """The norm divides by what is left of epsilon, not by nothing."""
    into = caches("NHD", 2, Shape(1, 1, 4, 4, 4), torch.float32)
    key = torch.zeros(1, 1, 4)
    args = (torch.tensor([3]), table(4), torch.tensor([5]), *into, torch.ones(4), EPS, True)
    kv_fill.implementation("cpu", choice)(key, key + 1, *args)
    assert into[0][1, 1].tolist() == [[0.0] * 4]


@implementations
@pairings
def test_turns_as_vllm_does(choice: str, neox: bool) -> None:
    """The table and the pairing are vLLM's own."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    key, value = torch.randn(2, 6, 2, 16, generator=torch.Generator().manual_seed(3))
    positions, slots = torch.arange(6) * 7, torch.arange(6)
    into = caches("HND", 2, Shape(6, 2, 16, 12, 16), torch.float32)
    kv_fill.implementation("cpu", choice)(
        key, value, positions, table(12), slots, *into, torch.empty(0), EPS, neox
    )
    turned, _ = RotaryEmbedding.forward_static(
        positions, key.flatten(1), None, 16, 12, table(12), neox
    )
    got = torch.stack([into[0][slot // 4, slot % 4] for slot in range(6)])
    torch.testing.assert_close(got, turned.view_as(key), rtol=1e-5, atol=1e-6)


@norms
def test_operator(normed: bool) -> None:
    key, value = torch.randn(2, 3, 2, 8)
    into = caches("apart", 2, Shape(3, 2, 8, 6, 8), torch.float32)
    weight = torch.ones(8 if normed else 0)
    args = (torch.arange(3), table(6), torch.tensor([4, -1, 0]), *into, weight, EPS, True)
    torch.library.opcheck(kv_fill.op.default, (key, value, *args))
