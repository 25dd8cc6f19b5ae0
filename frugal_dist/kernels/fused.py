"""The Triton kernels. Importing this module needs triton; nothing else in the package does.

Weights and gradients may be fp32, bf16 or fp16, moments are fp32; arithmetic is fp32, rounded once. Not for fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from frugal_dist.config import FrugalConfig
from frugal_dist.projection.coordinates import Columns, Flat, Rows, Selection

BLOCK = 1024
_WORD = 32
_AT_ONCE = 1 << 22
"""Entries whose temporary int64 numbers are held at the same time."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _signed(x: tl.tensor, size: tl.tensor) -> tl.tensor:
    """Size * sign(x)."""
    return tl.where(x > 0, size, tl.where(x < 0, -size, 0.0))


@triton.jit
def _adam(
    g: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    correction: tl.tensor,
) -> tl.tensor:
    """The new moments and the direction U, without the first bias correction; rest1 is 1 - beta1."""
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    return m, v, tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), correction) + eps)


@triton.jit
def _sign_kernel(
    w_ptr: tl.tensor, g_ptr: tl.tensor, numel: tl.tensor, keep: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(w_ptr + at, w * keep - _signed(g, size), mask=inside)


@triton.jit
def _mixed(
    w_ptr: tl.tensor,
    g_ptr: tl.tensor,
    m_ptr: tl.tensor,
    v_ptr: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    picked: tl.tensor,
    slot: tl.tensor,
    keep: tl.tensor,
    size: tl.tensor,
    rate: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    correction: tl.tensor,
) -> None:
    """AdamW for entries that are ``picked``, whose moments lie at ``slot``; a signed step for the others."""
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32) * keep
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + slot, mask=picked, other=0.0)
    v = tl.load(v_ptr + slot, mask=picked, other=0.0)
    m, v, u = _adam(g, m, v, rest1, beta2, rest2, eps, correction)
    tl.store(m_ptr + slot, m, mask=picked)
    tl.store(v_ptr + slot, v, mask=picked)
    tl.store(w_ptr + at, w - tl.where(picked, rate * u, _signed(g, size)), mask=inside)


@triton.jit
def _lines_kernel(
    w_ptr: tl.tensor,
    g_ptr: tl.tensor,
    m_ptr: tl.tensor,
    v_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    numel: tl.tensor,
    cols: tl.tensor,
    count: tl.tensor,
    keep: tl.tensor,
    size: tl.tensor,
    rate: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    correction: tl.tensor,
    BY_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Columns or rows; ``slots_ptr``: for each line its place among the ``count`` selected ones, or -1."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    row, col = at // cols, at % cols
    line = tl.load(slots_ptr + (row if BY_ROW else col), mask=inside, other=-1)
    slot = line * cols + col if BY_ROW else row * count + line
    _mixed(
        w_ptr, g_ptr, m_ptr, v_ptr, at, inside, line >= 0, slot, keep, size, rate, rest1, beta2, rest2, eps, correction
    )


@triton.jit
def _flat_kernel(
    w_ptr: tl.tensor,
    g_ptr: tl.tensor,
    m_ptr: tl.tensor,
    v_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    before_ptr: tl.tensor,
    numel: tl.tensor,
    keep: tl.tensor,
    size: tl.tensor,
    rate: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    correction: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Single entries; one bit for each tells which, ``before_ptr`` how many are selected before each block."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    bit = (tl.load(bits_ptr + at // 32, mask=inside, other=0) >> (at % 32)) & 1
    slot = tl.load(before_ptr + block) + tl.cumsum(bit, 0) - bit
    _mixed(
        w_ptr, g_ptr, m_ptr, v_ptr, at, inside, bit == 1, slot, keep, size, rate, rest1, beta2, rest2, eps, correction
    )


def sign_step_(weight: Tensor, grad: Tensor, size: float, keep: float = 1.0) -> bool:
    """W <- keep W - size sign(G) in one pass. False, and nothing done, if the tensors are not made for it."""
    if not _fit(weight, grad) or weight.numel() == 0:
        return False
    with _on(weight):
        _sign_kernel[_grid(weight)](weight, grad, weight.numel(), keep, size, BLOCK=BLOCK)
    return True


def coordinate_step_(weight: Tensor, grad: Tensor, selection: Selection, moments: Sequence[Tensor], step: int,
                     decay: float, config: FrugalConfig) -> bool:  # fmt: skip
    """``update.update_coordinates`` of one matrix, weight decay included, in one pass over weights and gradients.

    AdamW and sign only. False, and nothing done, for other rules, selections and tensors.
    """
    launch = _LAUNCH.get(type(selection))
    rules = (config.state_full, config.state_free) == ("adamw", "sign")
    if launch is None or not rules or not _fit(weight, grad, *moments) or weight.numel() == 0:
        return False
    with _on(weight):
        launch(weight, grad, selection, moments, _scalars(step, decay, config))
    return True


def _scalars(step: int, decay: float, config: FrugalConfig) -> tuple[float, ...]:
    beta1, beta2 = config.beta_pair
    rate = config.lr * config.lr_scale
    return (
        1.0 - config.lr * decay,
        rate * config.state_free_lr_scale,
        rate / (1.0 - beta1**step),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        config.eps,
        (1.0 - beta2**step) ** 0.5,
    )


def _columns(weight: Tensor, grad: Tensor, selection: Any, moments: Sequence[Tensor], scalars: Any) -> None:
    _lines(weight, grad, selection, moments, scalars, weight.shape[1], by_row=False)


def _rows(weight: Tensor, grad: Tensor, selection: Any, moments: Sequence[Tensor], scalars: Any) -> None:
    _lines(weight, grad, selection, moments, scalars, weight.shape[0], by_row=True)


def _lines(weight: Tensor, grad: Tensor, selection: Columns | Rows, moments: Sequence[Tensor], scalars: Any,
           lines: int, by_row: bool) -> None:  # fmt: skip
    count = selection.index.numel()
    if "slots" not in selection.memo:
        slots = torch.full((lines,), -1, dtype=torch.int32, device=weight.device)
        slots[selection.index] = torch.arange(count, dtype=torch.int32, device=weight.device)
        selection.memo["slots"] = slots
    _lines_kernel[_grid(weight)](
        weight, grad, *moments, selection.memo["slots"], weight.numel(), weight.shape[1], count, *scalars,
        BY_ROW=by_row, BLOCK=BLOCK,
    )  # fmt: skip


def _flat(weight: Tensor, grad: Tensor, selection: Any, moments: Sequence[Tensor], scalars: Any) -> None:
    if "bits" not in selection.memo:
        bits, before = packed(selection.index, weight.numel())
        selection.memo.update(bits=bits, before=before)
    bits, before = selection.memo["bits"], selection.memo["before"]
    _flat_kernel[_grid(weight)](weight, grad, *moments, bits, before, weight.numel(), *scalars, BLOCK=BLOCK)


_LAUNCH: dict[type, Callable[[Tensor, Tensor, Any, Sequence[Tensor], Any], None]] = {
    Columns: _columns,
    Rows: _rows,
    Flat: _flat,
}


def packed(index: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """A sorted flat index as one bit per entry (int32 words), and the number of selected entries before each block."""
    blocks = triton.cdiv(numel, BLOCK)
    marks = torch.zeros(blocks * BLOCK, dtype=torch.bool, device=index.device)
    for part in index.split(_AT_ONCE):
        marks[part.long()] = True
    weights = torch.ones(_WORD, dtype=torch.int64, device=index.device) << torch.arange(_WORD, device=index.device)
    parts = marks.view(-1, _WORD).split(_AT_ONCE // _WORD)
    words = torch.cat([(part * weights).sum(1).to(torch.int32) for part in parts])  # bit 31 wraps to the sign bit
    counts = marks.view(blocks, BLOCK).sum(1)
    return words, (counts.cumsum(0) - counts).to(torch.int32)


def _fit(weight: Tensor, grad: Tensor, *moments: Tensor) -> bool:
    if weight.numel() >= 2**31:  # positions are int32
        return False
    dtypes = weight.dtype in _FLOATS and grad.dtype in _FLOATS and all(m.dtype == torch.float32 for m in moments)
    return dtypes and all(tensor.is_contiguous() for tensor in (weight, grad, *moments))


def _grid(weight: Tensor) -> tuple[int]:
    return (triton.cdiv(weight.numel(), BLOCK),)


def _on(weight: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(weight.device) if weight.is_cuda else nullcontext()
