"""The update rules: state-full (AdamW, Lion, SGD with momentum) and state-free (sign, SGD, none).

Pure functions on lists of equally typed tensors, in place. A state-full rule moves ``params`` by ``-lr * U``; give
it zeros to get the update itself. Weight decay is decoupled and comes first (FRUGAL, Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class StateFull:
    """A state-full rule: the names of its moments and its update.

    ``update(params, grads, moments, step, lr, weight_decay, config)``: ``moments`` holds one list for each name,
    ``step`` counts from 1 since the last reset and is common to all tensors of the call.
    """

    moments: tuple[str, ...]
    update: Callable[[Tensors, Tensors, Sequence[Tensors], int, float, float, FrugalConfig], None]


def adamw(
    params: Tensors,
    grads: Tensors,
    moments: Sequence[Tensors],
    step: int,
    lr: float,
    decay: float,
    config: FrugalConfig,
) -> None:
    """torch.optim.AdamW's update (Loshchilov & Hutter 2019) with bias correction at ``step``, fused where torch can."""
    if not params:
        return
    exp_avg, exp_avg_sq = moments
    kernel = _fused_adamw if _has_fused(params[0]) else _foreach_adamw
    kernel(params, grads, exp_avg, exp_avg_sq, step, lr, decay, config)


def lion(
    params: Tensors,
    grads: Tensors,
    moments: Sequence[Tensors],
    step: int,
    lr: float,
    decay: float,
    config: FrugalConfig,
) -> None:
    """Lion (Chen et al. 2023): U = sign(b1 m + (1-b1) g), then m <- b2 m + (1-b2) g."""
    if not params:
        return
    beta1, beta2 = config.beta_pair
    (exp_avg,) = moments
    _decay(params, lr, decay)
    update = torch._foreach_lerp(list(exp_avg), list(grads), 1.0 - beta1)
    torch._foreach_sign_(update)
    torch._foreach_add_(list(params), update, alpha=-lr)
    torch._foreach_lerp_(list(exp_avg), list(grads), 1.0 - beta2)


def sgdm(
    params: Tensors,
    grads: Tensors,
    moments: Sequence[Tensors],
    step: int,
    lr: float,
    decay: float,
    config: FrugalConfig,
) -> None:
    """SGD with momentum, torch.optim.SGD's rule: buf <- mu buf + g, U = buf. A zero buffer starts at g."""
    if not params:
        return
    (buffer,) = moments
    _decay(params, lr, decay)
    torch._foreach_mul_(list(buffer), config.momentum)
    torch._foreach_add_(list(buffer), list(grads))
    torch._foreach_add_(list(params), list(buffer), alpha=-lr)


STATE_FULL: dict[str, StateFull] = {
    "adamw": StateFull(("exp_avg", "exp_avg_sq"), adamw),
    "lion": StateFull(("exp_avg",), lion),
    "sgdm": StateFull(("exp_avg",), sgdm),
}

# Each entry turns a residual into the direction of the state-free step, in a new tensor; None: no step at all.
STATE_FREE: dict[str, Callable[[Tensor], Tensor] | None] = {
    "sign": torch.sign,
    "sgd": lambda residual: residual,
    "none": None,
}


def _decay(params: Tensors, lr: float, decay: float) -> None:
    if decay != 0.0:
        torch._foreach_mul_(list(params), 1.0 - lr * decay)


def _has_fused(example: Tensor) -> bool:
    """torch._fused_adamw_ is private: used where it exists and knows the device."""
    return hasattr(torch, "_fused_adamw_") and example.device.type in ("cpu", "cuda")


def _fused_adamw(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    step: int,
    lr: float,
    decay: float,
    config: FrugalConfig,
) -> None:
    beta1, beta2 = config.beta_pair
    steps = torch.full((), float(step), dtype=torch.float32, device=params[0].device)
    torch._fused_adamw_(
        list(params),
        list(grads),
        list(exp_avg),
        list(exp_avg_sq),
        [],
        [steps] * len(params),
        amsgrad=False,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=decay,
        eps=config.eps,
        maximize=False,
    )


def _foreach_adamw(
    params: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    step: int,
    lr: float,
    decay: float,
    config: FrugalConfig,
) -> None:
    beta1, beta2 = config.beta_pair
    _decay(params, lr, decay)
    torch._foreach_lerp_(list(exp_avg), list(grads), 1.0 - beta1)
    torch._foreach_mul_(list(exp_avg_sq), beta2)
    torch._foreach_addcmul_(list(exp_avg_sq), list(grads), list(grads), 1.0 - beta2)
    denominator = torch._foreach_sqrt(list(exp_avg_sq))
    torch._foreach_div_(denominator, (1.0 - beta2**step) ** 0.5)
    torch._foreach_add_(denominator, config.eps)
    torch._foreach_addcdiv_(list(params), list(exp_avg), denominator, -lr / (1.0 - beta1**step))
