"""One step of one tile: the formulas of FRUGAL on local tensors. No communication, no clocks.

W <- W (1 - lr wd); R = down(G); W <- W - lr s up(U(R)) - lr s s_free free(G - up(R))   (FRUGAL, Algorithm 1)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig
from frugal_dist.kernels import fused_for
from frugal_dist.projection.basis import Basis, add_up_, down, residual, silence_noise_
from frugal_dist.projection.coordinates import Selection
from frugal_dist.projection.numerics import compute_dtype
from frugal_dist.rules import STATE_FREE, STATE_FULL

Moments = Sequence[Tensor]


def decay_(weight: Tensor, lr: float, decay: float) -> None:
    """Decoupled weight decay, before everything else, with the unscaled lr."""
    if decay != 0.0:
        weight.mul_(1.0 - lr * decay)


def state_full_(params: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Moments], step: int,
                lr: float, decay: float, config: FrugalConfig) -> None:  # fmt: skip
    """Move ``params`` by the state-full rule; ``moments`` holds one tuple for each of them."""
    rule = STATE_FULL[config.state_full]
    columns = [[own[k] for own in moments] for k in range(len(rule.moments))]
    rule.update(params, grads, columns, step, lr, decay, config)


def state_free_(weight: Tensor, grad: Tensor, config: FrugalConfig, decay: float = 0.0) -> None:
    """W <- W (1 - lr decay) - lr s s_free free(G)."""
    direction = STATE_FREE[config.state_free]
    size = config.lr * config.lr_scale * config.state_free_lr_scale
    fused = fused_for(weight)
    keep = 1.0 - config.lr * decay
    if fused is not None and config.state_free == "sign" and fused.sign_step_(weight, grad, size, keep):
        return
    decay_(weight, config.lr, decay)
    if direction is not None:
        weight.add_(direction(grad), alpha=-size)


def update_regular(params: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Moments], step: int,
                   decay: float, config: FrugalConfig) -> None:  # fmt: skip
    """Regular parameters: the state-full rule alone. Low-precision ones are updated in fp32 and rounded once."""
    wide = [_dense(param) for param in params]
    state_full_(wide, [_dense(grad) for grad in grads], moments, step, config.lr, decay, config)
    for param, result in zip(params, wide, strict=True):
        if result is not param:
            param.copy_(result)


def update_coordinates(weights: Sequence[Tensor], grads: Sequence[Tensor], chosen: Sequence[Selection],
                       moments: Sequence[Moments], step: int, decay: float,
                       config: FrugalConfig) -> None:  # fmt: skip
    """Weight decay; then selected entries move by the state-full rule, all others by the state-free one."""
    left = []
    for position, (weight, grad, selection, own) in enumerate(zip(weights, grads, chosen, moments, strict=True)):
        fused = fused_for(weight)
        if fused is None or not fused.coordinate_step_(weight, grad, selection, own, step, decay, config):
            left.append(position)
            decay_(weight, config.lr, decay)
    if left:
        _update_coordinates([weights[i] for i in left], [grads[i] for i in left], [chosen[i] for i in left],
                            [moments[i] for i in left], step, config)  # fmt: skip


def _update_coordinates(weights: Sequence[Tensor], grads: Sequence[Tensor], chosen: Sequence[Selection],
                        moments: Sequence[Moments], step: int, config: FrugalConfig) -> None:  # fmt: skip
    """In torch's operations.

    A selection of everything moves the weights in place. Otherwise the selected gradients are gathered, their update is
    computed by the fused rule and joins the state-free one: the weights are read and written once.
    """
    low = [_dense(selection.take(grad)) for selection, grad in zip(chosen, grads, strict=True)]
    moved = [
        _dense(weight) if selection.complete else torch.zeros_like(part)
        for selection, weight, part in zip(chosen, weights, low, strict=True)
    ]
    state_full_(moved, low, moments, step, config.lr * config.lr_scale, 0.0, config)
    for weight, grad, selection, values in zip(weights, grads, chosen, moved, strict=True):
        if selection.complete:
            selection.put_(weight, values)
        else:
            add_coordinates_(weight, grad, selection, values, config)


def add_coordinates_(weight: Tensor, grad: Tensor, selection: Selection, moved: Tensor, config: FrugalConfig) -> None:
    """Add the update ``moved`` (-lr s U, in R's shape) to the selected entries and the state-free step to the others.

    Both are put together in one small buffer that stays in the cache: writing scattered entries is cheap only there.
    """
    direction = STATE_FREE[config.state_free]
    if selection.complete:
        weight.add_(moved)
    elif direction is None:
        selection.put_(weight, (_wide(selection.take(weight)) + moved).to(weight.dtype))
    else:
        wide = _wide(grad)
        free = direction(wide)
        scale = -config.lr * config.lr_scale * config.state_free_lr_scale
        delta = free.mul(scale) if free is grad else free.mul_(scale)
        selection.put_(delta, moved)
        weight.add_(delta)


def coordinate_share(grad: Tensor, selection: Selection, bounds: tuple[int, int], moments: Moments, step: int,
                     config: FrugalConfig) -> Tensor:  # fmt: skip
    """This replica's share of -lr s U: the range ``bounds`` of R along the selection's free dim."""
    low = _wide(selection.take(grad)).narrow(selection.free_dim, bounds[0], bounds[1] - bounds[0]).contiguous()
    return _step_from_zero(low, moments, step, config)


def basis_step_(weight: Tensor, grad: Tensor, basis: Basis, side: str, moments: Moments, step: int,
                config: FrugalConfig) -> None:  # fmt: skip
    """A basis projection of one tile, in place."""
    if weight.dtype != compute_dtype(weight.dtype):
        weight.add_(basis_delta(grad, basis, side, moments, step, config))
        return
    grad = _wide(grad)
    low = down(grad, basis)
    if STATE_FREE[config.state_free] is not None:
        rest = silence_noise_(residual(grad, low, basis), grad, side, config.residual_threshold)
        state_free_(weight, rest, config)
        del rest
    add_up_(weight, _step_from_zero(low, moments, step, config), basis)


def basis_delta(grad: Tensor, basis: Basis, side: str, moments: Moments, step: int, config: FrugalConfig) -> Tensor:
    """The same as a tensor to add to the weights (without weight decay), for weights that lie elsewhere."""
    grad = _wide(grad)
    low = down(grad, basis)
    direction = STATE_FREE[config.state_free]
    if direction is None:
        delta = torch.zeros_like(grad, memory_format=torch.contiguous_format)
    else:
        rest = silence_noise_(residual(grad, low, basis), grad, side, config.residual_threshold)
        delta = direction(rest).mul_(-config.lr * config.lr_scale * config.state_free_lr_scale)
    return add_up_(delta, _step_from_zero(low, moments, step, config), basis)


def _step_from_zero(low: Tensor, moments: Moments, step: int, config: FrugalConfig) -> Tensor:
    """-lr s U(low), by moving zeros: the fused rules only know how to move parameters."""
    moved = torch.zeros_like(low, memory_format=torch.contiguous_format)
    state_full_([moved], [low], [moments], step, config.lr * config.lr_scale, 0.0, config)
    return moved


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor.dtype))


def _dense(tensor: Tensor) -> Tensor:
    """Wide and contiguous: the fused rules walk memory without looking at strides."""
    return _wide(tensor).contiguous()
