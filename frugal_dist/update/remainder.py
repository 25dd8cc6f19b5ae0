"""Exact fp32 weights in 16 more bits: bf16 weights that a model computes with, and what rounding left of each.

A weight is the bf16 number nearest to the exact one, ties away from zero; the remainder is the difference of their
bits as integers, fp32's minus bf16's, which an int16 holds. Ties to even, as casts round, would give every even weight
65,537 exact numbers, one more than 16 bits tell apart; the two differ for one number in 131,072. Any remainder goes
with any weight: what they make rounds to this weight, so that weights may be changed from outside.

The split is that of Apex and Transformer Engine (``store_param_remainders`` of FusedAdam, which Megatron uses).
"""

from __future__ import annotations

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
    bits = weight.view(torch.int16).to(torch.int32, memory_format=torch.contiguous_format)
    zero = (bits & 0x7FFF) == 0
    bits.mul_(1 << 16).add_(torch.where(zero, remainder.clamp(min=0), remainder))
    return bits.view(torch.float32)


def split_(weight: Tensor, remainder: Tensor, exact: Tensor) -> None:
    """Write fp32 ``exact`` to bf16 ``weight`` and int16 ``remainder`` of the same shape: ``joined`` gives it back.

    Infinities and NaN stay such; a number above bf16's largest becomes infinity in bf16, and is kept.
    """
    if exact.numel() == 0:
        return
    if exact.dim() == 0:
        weight, remainder, exact = weight.view(1), remainder.view(1), exact.view(1)
    width = exact.numel() // exact.shape[0]
    high = max(1, (_CUDA_CHUNK if exact.is_cuda else _CHUNK) // max(1, width))
    for target, rest, part in zip(weight.split(high), remainder.split(high), exact.split(high), strict=True):
        bits = torch.where(part == part, part.view(torch.int32), _NAN)
        near = (bits + (1 << 15)) >> 16
        rest.copy_(bits - near * (1 << 16))
        target.view(torch.int16).copy_(near)
