"""Matrix products of a step (``matmul``): fp32 as it is, or split into two bf16 parts, three of whose products count.

Tensor cores multiply bf16 many times as fast as fp32. Two parts hold 16 bits of each number, and the fourth product, of
the two small parts, is below what they hold. All sums are in fp32. fp64 is multiplied as it is, whatever is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Adds(Protocol):
    """``out + alpha a b``."""

    def __call__(self, out: Tensor, a: Tensor, b: Tensor, /, *, alpha: float) -> Tensor: ...


class Products(NamedTuple):
    """``multiply(a, b)``, ``add_(out, a, b, alpha=)`` in place, without a temporary of out's size, and
    ``add`` in a new tensor, which is contiguous.

    In fp32 they are torch's own: a step has three per matrix.
    """

    multiply: Callable[[Tensor, Tensor], Tensor]
    add_: Adds
    add: Adds


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two bf16 tensors whose sum is within 2^-17 of each fp32 number."""
    high = values.bfloat16()
    return high, (values - high).bfloat16()


def _multiply_split(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype != torch.float32:
        return a @ b
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    if a.numel() >= b.numel():  # the larger factor is read twice, and never copied
        both = _in_fp32(a_high, torch.cat((b_high, b_low), 1))
        return both[:, : b.shape[1]] + both[:, b.shape[1] :] + _in_fp32(a_low, b_high)
    both = _in_fp32(torch.cat((a_high, a_low)), b_high)
    return both[: len(a)] + both[len(a) :] + _in_fp32(a_high, b_low)


def _add_split_(out: Tensor, a: Tensor, b: Tensor, /, *, alpha: float) -> Tensor:
    """One product with an inner dim three times as long: both factors are small where out is large."""
    if a.dtype != torch.float32:
        return out.addmm_(a, b, alpha=alpha)
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    left, right = torch.cat((a_high, a_high, a_low), 1), torch.cat((b_high, b_low, b_high))
    if not _multiplies_wide(out.device):
        return out.addmm_(left.float(), right.float(), alpha=alpha)
    if _adds_wide(out.device):
        return torch.addmm(out, left, right, out_dtype=torch.float32, alpha=alpha, out=out)
    return out.add_(_in_fp32(left, right), alpha=alpha)


def _add_split(out: Tensor, a: Tensor, b: Tensor, /, *, alpha: float) -> Tensor:
    return _add_split_(out.clone(memory_format=torch.contiguous_format), a, b, alpha=alpha)


MATMULS = {
    "fp32": Products(torch.mm, Tensor.addmm_, torch.addmm),
    "bf16x3": Products(_multiply_split, _add_split_, _add_split),
}


def _in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """The product of two bf16 matrices in fp32: products of bf16 numbers are exact in it, so copies do as well."""
    if _multiplies_wide(a.device):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@cache
def _multiplies_wide(device: torch.device) -> bool:
    """Whether torch can multiply bf16 matrices into fp32 there: on CUDA, where tensor cores have bf16."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    one = torch.ones((16, 16), dtype=torch.bfloat16, device=device)
    return _is(16.0, lambda: torch.mm(one, one, out_dtype=torch.float32))


@cache
def _adds_wide(device: torch.device) -> bool:
    """Whether it can also add such a product to an fp32 tensor in place: some releases of torch refuse that."""
    one = torch.ones((16, 16), dtype=torch.bfloat16, device=device)
    out = one.float()
    return _is(-15.0, lambda: torch.addmm(out, one, one, out_dtype=torch.float32, alpha=-1.0, out=out))


def _is(value: float, product: Callable[[], Tensor]) -> bool:
    try:
        return bool((product() == value).all())
    except (RuntimeError, TypeError):
        return False
