"""The Triton kernels: each program steps one block of one of many matrices, which a table describes (``tables``).

Weights and gradients may be fp32, bf16 or fp16, moments are fp32; arithmetic is fp32, rounded once (NOISE:
stochastically). Square roots and quotients are the GPU's fast ones, right to about 2e-7: the exact ones take as many
instructions as all the rest.
ALIGNED promises that addresses and sizes are multiples of 16, so that four numbers are read and written at a time.
Products and sums are joined by name (``tl.fma``), or each compilation would join others, and replicas drift apart.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from frugal_dist.update import eightbit
from frugal_dist.update.kernels import tables

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Of weights and gradients."""

MOST = tl.constexpr(tables.MOST)
BLOCK = tl.constexpr(tables.BLOCK)
HIGH, WIDE = tl.constexpr(tables.HIGH), tl.constexpr(tables.WIDE)
WEIGHT, GRAD = tl.constexpr(tables.WEIGHT), tl.constexpr(tables.GRAD)
FIRST, SECOND = tl.constexpr(tables.FIRST), tl.constexpr(tables.SECOND)
INDEX, BEFORE = tl.constexpr(tables.INDEX), tl.constexpr(tables.BEFORE)
ROWS, COLS, COUNT = tl.constexpr(tables.ROWS), tl.constexpr(tables.COLS), tl.constexpr(tables.COUNT)
START, STRIDE = tl.constexpr(tables.START), tl.constexpr(tables.STRIDE)
KEY0, KEY1 = tl.constexpr(tables.KEY0), tl.constexpr(tables.KEY1)
FEW, CODED = tl.constexpr(tables.FEW), tl.constexpr(eightbit.BLOCK)
DECADES = tl.constexpr(eightbit.DECADES)
BELOW = tl.constexpr(sum(value < 0 for value in eightbit.dynamic_values(signed=True)))


@triton.jit
def _matrix_and_block(table: tl.tensor) -> tl.tensor:
    """Which matrix this program works on, and on which block of it."""
    program = tl.program_id(0)
    reached = tl.load(table + tl.arange(0, MOST)) <= program
    matrix = tl.sum(reached.to(tl.int32), 0) - 1
    return matrix, program - tl.load(table + matrix).to(tl.int32)


@triton.jit
def _address(
    table: tl.tensor, entry: tl.constexpr, matrix: tl.tensor, kind: tl.constexpr, aligned: tl.constexpr
) -> tl.tensor:
    pointer = tl.load(table + entry * MOST + matrix).to(tl.pointer_type(kind))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _number(table: tl.tensor, entry: tl.constexpr, matrix: tl.tensor, aligned: tl.constexpr) -> tl.tensor:
    number = tl.load(table + entry * MOST + matrix).to(tl.int32)
    if aligned:
        number = tl.multiple_of(number, 16)
    return number


@triton.jit
def _scrambled(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _rounded(x: tl.tensor, index: tl.tensor, key0: tl.tensor, key1: tl.tensor) -> tl.tensor:
    """fp32 rounded to bf16 by the random bits of an int64 index: ``stochastic_rounding``, number for number."""
    low, high = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32)
    random = _scrambled(_scrambled(low ^ key0) + (high + key1)) & 0xFFFF
    bits = x.to(tl.uint32, bitcast=True)
    up = ((bits + random) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where((bits & 0x7F800000) != 0x7F800000, up, x.to(tl.bfloat16))


@triton.jit
def _keys(table: tl.tensor, matrix: tl.tensor) -> tl.tensor:
    key0 = tl.load(table + KEY0 * MOST + matrix).to(tl.uint32)
    return key0, tl.load(table + KEY1 * MOST + matrix).to(tl.uint32)


@triton.jit
def _places(table: tl.tensor, matrix: tl.tensor, at: tl.tensor) -> tl.tensor:
    """The indices in the whole parameter of entries that are counted through the matrix."""
    start, stride = tl.load(table + START * MOST + matrix), tl.load(table + STRIDE * MOST + matrix)
    cols = _number(table, COLS, matrix, False)
    across = at.to(tl.int64)
    if stride != cols:
        row = at // cols
        across = row * stride + (at - row * cols)
    return start + across


@triton.jit
def _signed(x: tl.tensor, size: tl.tensor) -> tl.tensor:
    """Size * sign(x)."""
    return tl.where(x > 0, size, tl.where(x < 0, -size, 0.0))


@triton.jit
def _signed_step(w_ptr: tl.tensor, g_ptr: tl.tensor, inside: tl.tensor, keep: tl.tensor, size: tl.tensor) -> tl.tensor:
    w = tl.load(w_ptr, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr, mask=inside, other=0.0).to(tl.float32)
    return tl.fma(w, keep, -_signed(g, size))


@triton.jit
def sign_one(w_ptr: tl.tensor, g_ptr: tl.tensor, numel: tl.tensor, keep: tl.tensor, size: tl.tensor) -> None:
    """A signed step of one matrix, without a table."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    tl.store(w_ptr + at, _signed_step(w_ptr + at, g_ptr + at, inside, keep, size), mask=inside)


@triton.jit(do_not_specialize=["key0", "key1"])
def round_rows(
    w_ptr: tl.tensor,
    wide_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    key0: tl.tensor,
    key1: tl.tensor,
    TALL: tl.constexpr,
) -> None:
    """Stochastic rounding of fp32 rows, whose first entries have the indices ``starts``; in blocks of TALL rows.

    Keys are int32, or large ones would be compiled for as int64.
    """
    broad: tl.constexpr = BLOCK // TALL
    across = tl.cdiv(cols, broad)
    row = tl.program_id(0) // across * TALL + tl.arange(0, TALL)
    col = tl.program_id(0) % across * broad + tl.arange(0, broad)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    index = tl.load(starts_ptr + row, mask=row < rows, other=0)[:, None] + col[None, :]
    at = row[:, None] * cols + col[None, :]
    wide = tl.load(wide_ptr + at, mask=inside, other=0.0)
    tl.store(w_ptr + at, _rounded(wide, index, key0.to(tl.uint32), key1.to(tl.uint32)), mask=inside)


@triton.jit
def sign_above(
    w_ptr: tl.tensor,
    rest_ptr: tl.tensor,
    g_ptr: tl.tensor,
    cols: tl.tensor,
    keep: tl.tensor,
    size: tl.tensor,
    threshold: tl.tensor,
) -> None:
    """A signed step by those rows of ``rest`` whose norm is above ``threshold`` times the gradient's; one row each."""
    start = tl.program_id(0) * cols
    squares = tl.zeros((BLOCK,), tl.float32)
    wanted = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, cols, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        rest = tl.load(rest_ptr + start + col, mask=col < cols, other=0.0)
        g = tl.load(g_ptr + start + col, mask=col < cols, other=0.0)
        squares += rest * rest
        wanted += g * g
    noise = tl.sqrt(tl.sum(squares, 0)) <= threshold * tl.sqrt(tl.sum(wanted, 0))
    size = tl.where(noise, 0.0, size)
    for begin in range(0, cols, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + start + col, mask=col < cols, other=0.0)
        rest = tl.load(rest_ptr + start + col, mask=col < cols, other=0.0)
        tl.store(w_ptr + start + col, tl.fma(w, keep, -_signed(rest, size)), mask=col < cols)


@triton.jit
def sign(
    table: tl.tensor,
    keep: tl.tensor,
    size: tl.tensor,
    W: tl.constexpr,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    NOISE: tl.constexpr,
) -> None:
    """Signed steps; ROWS counts all entries."""
    matrix, block = _matrix_and_block(table)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < _number(table, ROWS, matrix, ALIGNED)
    w_ptr = _address(table, WEIGHT, matrix, W, ALIGNED) + at
    w = _signed_step(w_ptr, _address(table, GRAD, matrix, G, ALIGNED) + at, inside, keep, size)
    if NOISE:
        key0, key1 = _keys(table, matrix)
        w = _rounded(w, _places(table, matrix, at), key0, key1)
    tl.store(w_ptr, w, mask=inside)


@triton.jit
def _averaged(
    g: tl.tensor, m: tl.tensor, v: tl.tensor, rest1: tl.tensor, beta2: tl.tensor, rest2: tl.tensor
) -> tl.tensor:
    """AdamW's new moments."""
    return tl.fma(rest1, g - m, m), tl.fma(rest2 * g, g, beta2 * v)


@triton.jit
def _adam(m: tl.tensor, v: tl.tensor, rate: tl.tensor, eps: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    """By how much they move a weight."""
    return rate * (m / tl.fma(tl.sqrt(v), inverse, eps))


@triton.jit
def _mixed(
    w_ptr: tl.tensor,
    g_ptr: tl.tensor,
    m_ptr: tl.tensor,
    v_ptr: tl.tensor,
    inside: tl.tensor,
    picked: tl.tensor,
    keep: tl.tensor,
    size: tl.tensor,
    rate: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    inverse: tl.tensor,
) -> tl.tensor:
    """New weights: AdamW for entries that are ``picked``, a signed step for the others; a pointer for each entry.

    rate: lr s over the first bias correction. inverse: 1 over the root of the second. rest1, rest2: 1 - beta.
    """
    w = tl.load(w_ptr, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr, mask=picked, other=0.0)
    v = tl.load(v_ptr, mask=picked, other=0.0)
    m, v = _averaged(g, m, v, rest1, beta2, rest2)
    tl.store(m_ptr, m, mask=picked)
    tl.store(v_ptr, v, mask=picked)
    return tl.fma(w, keep, -tl.where(picked, _adam(m, v, rate, eps, inverse), _signed(g, size)))


@triton.jit
def lines(
    table: tl.tensor,
    keep: tl.tensor,
    size: tl.tensor,
    rate: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    inverse: tl.tensor,
    W: tl.constexpr,
    G: tl.constexpr,
    BY_ROW: tl.constexpr,
    ALIGNED: tl.constexpr,
    NOISE: tl.constexpr,
) -> None:
    """Columns or rows, in blocks of HIGH x WIDE; INDEX: for each line its place among COUNT selected ones, or -1."""
    matrix, block = _matrix_and_block(table)
    cols = _number(table, COLS, matrix, ALIGNED)
    across = tl.cdiv(cols, WIDE)
    row = block // across * HIGH + tl.arange(0, HIGH)
    col = block % across * WIDE + tl.arange(0, WIDE)
    low, left = row < _number(table, ROWS, matrix, False), col < cols
    slots = _address(table, INDEX, matrix, tl.int32, False)
    if BY_ROW:
        line = tl.load(slots + row, mask=low, other=-1)[:, None]
        slot = line * cols + col[None, :]
    else:
        line = tl.load(slots + col, mask=left, other=-1)[None, :]
        slot = row[:, None] * _number(table, COUNT, matrix, False) + line
    at, inside = row[:, None] * cols + col[None, :], low[:, None] & left[None, :]
    w_ptr = _address(table, WEIGHT, matrix, W, ALIGNED) + at
    w = _mixed(
        w_ptr,
        _address(table, GRAD, matrix, G, ALIGNED) + at,
        _address(table, FIRST, matrix, tl.float32, ALIGNED) + slot,
        _address(table, SECOND, matrix, tl.float32, ALIGNED) + slot,
        inside, inside & (line >= 0), keep, size, rate, rest1, beta2, rest2, eps, inverse,
    )  # fmt: skip
    if NOISE:
        key0, key1 = _keys(table, matrix)
        start, stride = tl.load(table + START * MOST + matrix), tl.load(table + STRIDE * MOST + matrix)
        w = _rounded(w, start + row[:, None] * stride + col[None, :], key0, key1)
    tl.store(w_ptr, w, mask=inside)


@triton.jit
def flat(
    table: tl.tensor,
    keep: tl.tensor,
    size: tl.tensor,
    rate: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    inverse: tl.tensor,
    W: tl.constexpr,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    NOISE: tl.constexpr,
) -> None:
    """Single entries; INDEX: a bit for each tells which, BEFORE: how many are selected before each block."""
    matrix, block = _matrix_and_block(table)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < _number(table, ROWS, matrix, ALIGNED)
    bits = _address(table, INDEX, matrix, tl.int32, False)
    before = _address(table, BEFORE, matrix, tl.int32, False)
    bit = (tl.load(bits + at // 32, mask=inside, other=0) >> (at % 32)) & 1
    slot = tl.load(before + block) + tl.cumsum(bit, 0) - bit
    w_ptr = _address(table, WEIGHT, matrix, W, ALIGNED) + at
    w = _mixed(
        w_ptr,
        _address(table, GRAD, matrix, G, ALIGNED) + at,
        _address(table, FIRST, matrix, tl.float32, False) + slot,
        _address(table, SECOND, matrix, tl.float32, False) + slot,
        inside, bit == 1, keep, size, rate, rest1, beta2, rest2, eps, inverse,
    )  # fmt: skip
    if NOISE:
        key0, key1 = _keys(table, matrix)
        w = _rounded(w, _places(table, matrix, at), key0, key1)
    tl.store(w_ptr, w, mask=inside)


@triton.jit
def _decoded(
    codes: tl.tensor, scales: tl.tensor, table: tl.tensor, inside: tl.tensor, block: tl.tensor, known: tl.tensor
) -> tl.tensor:  # fmt: skip
    """``eightbit.dequantize``. Beside a row there is 0, whatever the scale."""
    code = tl.load(codes, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + block, mask=known, other=0.0)
    return tl.where(inside, tl.load(table + code) * scale[:, None], 0.0)


@triton.jit
def _encode(
    x: tl.tensor, codes: tl.tensor, scales: tl.tensor, between: tl.tensor, inside: tl.tensor, block: tl.tensor,
    known: tl.tensor, SIGNED: tl.constexpr,
) -> None:  # fmt: skip
    """``eightbit.quantize``, code for code.

    Nothing is searched: the values of a decade are evenly apart, so where an entry lies is counted in steps behind its
    first one. In steps the middles of neighbours lie at 1, 2, ..., between decades at 0.2 of the upper one, below the
    least value at less, under 1.0 at -0.25: 0.3 further down is the right place or the one below, and a look at the
    middle above decides.
    """
    scale = tl.max(x, 1)
    if SIGNED:
        least = tl.min(x, 1)
        scale = tl.where(scale >= -least, scale, least)
    scale = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale)
    tl.store(scales + block, scale, mask=known)
    divisor = tl.where(scale == 0, 1.0, scale)
    part = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    size = tl.where(part == part, tl.abs(part), 0.0)
    steps = tl.full(x.shape, 1.0 if SIGNED else 2.0, tl.float32)
    slope = steps * (10.0 ** (DECADES - 1) / 0.9)
    for decade in tl.static_range(1, DECADES):
        above = size >= 10.0 ** (decade - DECADES)
        steps = tl.where(above, 2.0 * steps, steps)
        slope = tl.where(above, 0.2 * slope, slope)
    behind = tl.fma(size, slope, steps * (-1.0 / 9.0))
    if SIGNED:
        rank = tl.floor(behind + tl.where(part < 0, 0.3, -0.3)) + steps
        place = tl.where(part < 0, BELOW - rank, BELOW + rank).to(tl.int32)
    else:
        place = (tl.floor(behind - 0.3) + (steps - 1.0)).to(tl.int32)
    place = tl.minimum(tl.maximum(place, 0), 254)
    place += (part > tl.load(between + place)).to(tl.int32)
    place = tl.where(part == part, place, 255)
    if SIGNED:
        place = place - BELOW
    else:
        place = tl.maximum(place, (part > 0).to(tl.int32))
    tl.store(codes, place.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=[*range(14)])  # addresses and sizes: ALIGNED says what matters
def coded(
    w_ptr: tl.tensor,
    g_ptr: tl.tensor,
    m_ptr: tl.tensor,
    m_scales: tl.tensor,
    v_ptr: tl.tensor,
    v_scales: tl.tensor,
    m_table: tl.tensor,
    m_between: tl.tensor,
    v_table: tl.tensor,
    v_between: tl.tensor,
    width: tl.tensor,
    phase: tl.tensor,
    across: tl.tensor,
    blocks: tl.tensor,
    keep: tl.tensor,
    rate: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    inverse: tl.tensor,
    ALIGNED: tl.constexpr,
) -> None:
    """AdamW with moments in 8 bits: a few of the ``blocks`` that share scales, ``across`` of them in a row; the first
    entry of a row is number ``phase`` of its block.
    """
    block = tl.program_id(0) * FEW + tl.arange(0, FEW)
    known = block < blocks
    col = (block % across * CODED - phase)[:, None] + tl.arange(0, CODED)[None, :]
    inside = known[:, None] & (col >= 0) & (col < width)
    at = (block // across * width)[:, None] + col
    w_ptr, g_ptr, m_ptr, v_ptr = w_ptr + at, g_ptr + at, m_ptr + at, v_ptr + at
    if ALIGNED:
        inside = tl.max_constancy(inside, (1, 16))
        w_ptr, g_ptr = tl.multiple_of(w_ptr, (1, 16)), tl.multiple_of(g_ptr, (1, 16))
        m_ptr, v_ptr = tl.multiple_of(m_ptr, (1, 16)), tl.multiple_of(v_ptr, (1, 16))
    w = tl.load(w_ptr, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr, mask=inside, other=0.0).to(tl.float32)
    m = _decoded(m_ptr, m_scales, m_table, inside, block, known)
    v = _decoded(v_ptr, v_scales, v_table, inside, block, known)
    m, v = _averaged(g, m, v, rest1, beta2, rest2)
    tl.store(w_ptr, tl.fma(w, keep, -_adam(m, v, rate, eps, inverse)), mask=inside)
    _encode(m, m_ptr, m_scales, m_between, inside, block, known, True)
    _encode(v, v_ptr, v_scales, v_between, inside, block, known, False)
