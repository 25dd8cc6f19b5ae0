"""AdamW, fused where torch can."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frugal_dist.projection.basis import carry_first, carry_second
from frugal_dist.update.definition import Moment, RuleSettings, StateFull, Tensors, decay_


def adamw(
    params: Tensors,
    grads: Tensors,
    moments: Sequence[Tensors],
    step: int,
    lr: float,
    decay: float,
    config: RuleSettings,
) -> None:
    """torch.optim.AdamW's update (Loshchilov & Hutter 2019) with bias correction at ``step``, fused where torch can."""
    if not params:
        return
    exp_avg, exp_avg_sq = moments
    kernel = _fused_adamw if _has_fused(params[0]) else _foreach_adamw
    kernel(params, grads, exp_avg, exp_avg_sq, step, lr, decay, config)


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
    config: RuleSettings,
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
    config: RuleSettings,
) -> None:
    beta1, beta2 = config.beta_pair
    decay_(params, lr, decay)
    torch._foreach_lerp_(list(exp_avg), list(grads), 1.0 - beta1)
    torch._foreach_mul_(list(exp_avg_sq), beta2)
    torch._foreach_addcmul_(list(exp_avg_sq), list(grads), list(grads), 1.0 - beta2)
    denominator = torch._foreach_sqrt(list(exp_avg_sq))
    torch._foreach_div_(denominator, (1.0 - beta2**step) ** 0.5)
    torch._foreach_add_(denominator, config.eps)
    torch._foreach_addcdiv_(list(params), list(exp_avg), denominator, -lr / (1.0 - beta1**step))


ADAMW = StateFull(
    name="adamw",
    moments=(Moment("exp_avg", carry_first, signed=True), Moment("exp_avg_sq", carry_second, signed=False)),
    update=adamw,
    is_adamw=True,
    correction=lambda step, config: (1.0 - config.beta_pair[1] ** step) ** 0.5 / (1.0 - config.beta_pair[0] ** step),
    has_kernel=True,
)
