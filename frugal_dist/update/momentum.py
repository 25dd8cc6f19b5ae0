"""Rules with a first moment alone: Lion, and SGD with momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from frugal_dist.update.definition import Moment, RuleSettings, StateFull, Tensors, decay_


def lion(
    params: Tensors,
    grads: Tensors,
    moments: Sequence[Tensors],
    step: int,
    lr: float,
    decay: float,
    config: RuleSettings,
) -> None:
    """Lion (Chen et al. 2023): U = sign(b1 m + (1-b1) g), then m <- b2 m + (1-b2) g."""
    if not params:
        return
    beta1, beta2 = config.beta_pair
    (exp_avg,) = moments
    decay_(params, lr, decay)
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
    config: RuleSettings,
) -> None:
    """SGD with momentum, torch.optim.SGD's rule: buf <- mu buf + g, U = buf. A zero buffer starts at g."""
    if not params:
        return
    (buffer,) = moments
    decay_(params, lr, decay)
    torch._foreach_mul_(list(buffer), config.momentum)
    torch._foreach_add_(list(buffer), list(grads))
    torch._foreach_add_(list(params), list(buffer), alpha=-lr)


LION = StateFull(name="lion", moments=(Moment("exp_avg", signed=True),), update=lion, betas=(0.9, 0.99))
SGDM = StateFull(name="sgdm", moments=(Moment("exp_avg", signed=True),), update=sgdm, cycles="momentum")
