"""State-full rules of whole matrices: Muon, and SCALE's for heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frugal_dist.update.definition import Moment, RuleSettings, StateFull, Tensors

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_LEAST_NORM = 1e-7
_LEAST = 1e-8


def orthogonal(matrix: Tensor) -> Tensor:
    """All singular values brought near 1 by five Newton-Schulz rounds in bf16 (Jordan 2024; torch.optim.Muon)."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    iterate = matrix.bfloat16().T if tall else matrix.bfloat16()
    iterate = iterate / iterate.norm().clamp(min=_LEAST_NORM)
    for _ in range(_ROUNDS):
        gram = iterate @ iterate.T
        iterate = torch.addmm(iterate, torch.addmm(gram, gram, gram, beta=b, alpha=c), iterate, beta=a)
    return iterate.T if tall else iterate


def muon(
    params: Tensors,
    grads: Tensors,
    moments: Sequence[Tensors],
    step: int,
    lr: float,
    decay: float,
    config: RuleSettings,
) -> None:
    """torch.optim.Muon's step: Nesterov's momentum as an average, orthogonalised, larger for tall matrices."""
    for param, grad, average in zip(params, grads, *moments, strict=True):
        average.lerp_(grad, 1.0 - config.momentum)
        update = orthogonal(grad.lerp(average, config.momentum))
        rows, cols = param.shape
        param.mul_(1.0 - lr * decay).add_(update, alpha=-lr * max(1.0, rows / cols) ** 0.5)


def normalized(
    params: Tensors,
    grads: Tensors,
    moments: Sequence[Tensors],
    step: int,
    lr: float,
    decay: float,
    config: RuleSettings,
) -> None:
    """The average of gradients, each row divided by its root mean square (SCALE's head, arXiv 2506.16659)."""
    for param, grad, average in zip(params, grads, *moments, strict=True):
        average.lerp_(grad, 1.0 - config.momentum)
        size = average.square().mean(1, keepdim=True).sqrt_().clamp_(min=_LEAST)
        param.mul_(1.0 - lr * decay).sub_(average / size, alpha=lr)


MUON = StateFull(
    name="muon", moments=(Moment("exp_avg", signed=True),), update=muon, elementwise=False, regular="adamw"
)
NORMALIZED_MOMENTUM = StateFull(
    name="normalized_momentum",
    moments=(Moment("exp_avg", signed=True),),
    update=normalized,
    elementwise=False,
    regular="adamw",
)
