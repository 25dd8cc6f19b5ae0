"""Stochastic rounding of fp32 numbers to bf16: unbiased, and the same on every layout and number of ranks.

bf16 weights lose most small steps when they are rounded to the nearest: an update below half a unit in the last place
does nothing, forever. Rounded up with the probability that the remainder says, it is right on average.

The random bits of an entry are a function of (seed, parameter, step, its index in the whole parameter): no generator,
no order, nothing to store or to agree on.
"""

from __future__ import annotations

import hashlib
from math import prod

import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig
from frugal_dist.update.kernels import fused_for

_CHUNK, _CUDA_CHUNK = 1 << 16, 1 << 24
"""Entries rounded at once: their temporaries stay in the cache, or are worth the launches."""


def rounds_stochastically(config: FrugalConfig, dtype: torch.dtype) -> bool:
    """Whether weights of this dtype are: wider ones need no rounding."""
    return config.rounding == "stochastic" and dtype == torch.bfloat16


def row_starts(spans: tuple[tuple[int, int], ...], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Of a box of a row-major tensor of ``shape``: the flat index of the first entry of each of its rows, int64."""
    starts = torch.zeros((), dtype=torch.int64, device=device)  # there, or every step would wait for a copy
    for dim, span in enumerate(spans[:-1]):
        starts = starts.unsqueeze(-1) + torch.arange(*span, device=device) * prod(shape[dim + 1 :])
    return starts.reshape(-1) + (spans[-1][0] if spans else 0)


def round_stochastically_(target: Tensor, wide: Tensor, starts: Tensor, *, seed: int, name: str, step: int) -> None:
    """Write fp32 ``wide`` to bf16 ``target`` of the same shape; row i's entries have the indices starts[i], ...

    Numbers that bf16 has stay as they are; so do infinities and NaN.
    """
    if target.numel() == 0:
        return
    keys, fused = keys_of(seed, name, step), fused_for(target)
    if fused is not None and fused.round_(target, wide, starts, keys):
        return
    source, rows = wide.reshape(starts.numel(), -1), starts
    rounded = torch.empty(source.shape, dtype=target.dtype, device=target.device)
    width = source.shape[1]
    chunk = _CUDA_CHUNK if wide.is_cuda else _CHUNK
    high, broad = max(1, chunk // width), min(width, chunk)
    for top in range(0, source.shape[0], high):
        for left in range(0, width, broad):
            right = min(left + broad, width)
            index = rows[top : top + high].view(-1, 1) + torch.arange(left, right, device=wide.device)
            part = source[top : top + high, left:right]
            rounded[top : top + high, left:right] = _rounded(part, random_bits(index, keys))
    target.copy_(rounded.view(target.shape))


def _rounded(values: Tensor, bits: Tensor) -> Tensor:
    """Add 16 random bits below bf16's last place and cut off the rest: exact, since fp32 is bf16 and 16 more bits."""
    truncated = ((values.contiguous().view(torch.int32) + bits) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(values), truncated, values).to(torch.bfloat16)


def random_bits(index: Tensor, keys: tuple[int, int]) -> Tensor:
    """16 random bits for each int64 index, as int32: a counter-based hash with two rounds of a 32-bit finaliser."""
    low = (index & 0xFFFFFFFF) ^ (keys[0] & 0xFFFFFFFF)
    high = (index >> 32) + keys[1]
    return _mixed(_mixed(low.to(torch.int32)) + high.to(torch.int32)) & 0xFFFF  # the low 32 bits of each


def _mixed(x: Tensor) -> Tensor:
    """Xor-shift-multiply (Wellons' lowbias32). Products wrap; right shifts of int32 copy the sign, which is masked."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def keys_of(seed: int, name: str, step: int) -> tuple[int, int]:
    """What the random bits of one parameter at one step are drawn from."""
    digest = hashlib.sha256(f"frugal|rounding|{seed}|{name}|{step}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
