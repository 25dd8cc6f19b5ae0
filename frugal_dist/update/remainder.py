"""Exact fp32 weights in 16 more bits: bf16 weights that a model computes with, and what rounding left of each.

A weight is the bf16 number nearest to the exact one, ties away from zero; the remainder is the difference of their
bits as integers, fp32's minus bf16's, which an int16 holds. Ties to even, as casts round, would give every even weight
65,537 exact numbers, one more than 16 bits tell apart; the two differ for one number in 131,072. Any remainder goes
with any weight: what they make rounds to this weight, so that weights may be changed from outside.

The split is that of Apex and Transformer Engine (``store_param_remainders`` of FusedAdam, which Megatron uses).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig

REMAINDER = "remainder"
"""The choice of ``rounding``, and what the remainder is called in the state."""
_NAN = 0x7FC00000
_CHUNK, _CUDA_CHUNK = 1 << 16, 1 << 24
"""Entries split at once: their temporaries stay in the cache, or are worth the launches."""


def keeps_remainders(config: FrugalConfig) -> bool:
    """Whether weights of this group have remainders."""
    return config.rounding == REMAINDER


def joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """The exact weights, fp32 and contiguous, of bf16 ``weight`` and int16 ``remainder`` of the same shape.

    Zeros have no number below them: a negative remainder, which only a weight that was set to zero can have, is 0.
    """
    bits = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    for target, near, rest in _chunks(bits, weight.view(torch.int16), remainder):
        zero = (near & 0x7FFF) == 0
        torch.mul(near.to(torch.int32), 1 << 16, out=target)
        target.add_(torch.where(zero, rest.clamp(min=0), rest))
    return bits.view(torch.float32)


def split_(weight: Tensor, remainder: Tensor, exact: Tensor) -> None:
    """Write fp32 ``exact`` to bf16 ``weight`` and int16 ``remainder`` of the same shape: ``joined`` gives it back.

    Infinities and NaN stay such; a number above bf16's largest becomes infinity in bf16, and is kept.
    """
    for target, rest, part in _chunks(weight.view(torch.int16), remainder, exact):
        bits = torch.where(part == part, part.view(torch.int32), _NAN)
        near = (bits + (1 << 15)) >> 16
        target.copy_(near)
        rest.copy_(bits.sub_(near, alpha=1 << 16))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of some rows of tensors of one shape, of any number of dims, at a time."""
    first = tensors[0]
    if first.numel() == 0:
        return
    if first.dim() == 0:
        tensors = tuple(tensor.view(1) for tensor in tensors)
    rows = len(tensors[0])
    high = max(1, (_CUDA_CHUNK if first.is_cuda else _CHUNK) * rows // first.numel())
    yield from zip(*(tensor.split(high) for tensor in tensors), strict=True)
