"""One step of one tile: the formulas of FRUGAL on local tensors. No communication, no counters.

W <- W (1 - lr wd); R = down(G); W <- W - lr s up(U(R)) - lr s s_free free(G - up(R))   (FRUGAL, Algorithm 1)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig
from frugal_dist.projection.basis import Basis, add_up_, down, residual, silence_noise_, spans_everything
from frugal_dist.projection.coordinates import Selection
from frugal_dist.projection.numerics import compute_dtype
from frugal_dist.update.kernels import fused_for
from frugal_dist.update.kernels.jobs import TileUpdate
from frugal_dist.update.lines import Part, Sums, alone
from frugal_dist.update.rules import STATE_FREE, STATE_FULL

Moments = Sequence[Any]
"""Of one tensor, as its form (``moment_storage``) shows them."""

TOGETHER = 1 << 16
"""Entries of basis projections that are stepped at once: small matrices share calls, residuals stay in the cache."""


def decay_(weight: Tensor, lr: float, decay: float) -> None:
    """Decoupled weight decay, before everything else, with the unscaled lr."""
    if decay != 0.0:
        weight.mul_(1.0 - lr * decay)


def state_full_(params: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Moments], step: int,
                lr: float, decay: float, config: FrugalConfig) -> None:  # fmt: skip
    """Move ``params`` by the state-full rule; ``moments`` holds one tuple for each of them."""
    if _step_codes_(params, grads, moments, step, lr, decay, config):
        return
    rule = STATE_FULL[config.state_full]
    for some, their, columns in config.form.turns(params, grads, moments, rule.elementwise):
        rule.update(some, their, columns, step, lr, decay, config)


def _step_codes_(params: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Moments], step: int,
                 lr: float, decay: float, config: FrugalConfig) -> bool:  # fmt: skip
    """The same in a kernel that reads and writes 8-bit moments, where there is one; gradients may be narrower."""
    if not (config.form.blocky and params and STATE_FULL[config.state_full].has_kernel):
        return False
    fused = fused_for(params[0])
    return fused is not None and bool(fused.step_codes_(params, grads, moments, step, lr, decay, config))


def state_free_(weight: Tensor, grad: Tensor, config: FrugalConfig, decay: float = 0.0) -> None:
    """W <- W (1 - lr decay) - lr s s_free free(G)."""
    rule = STATE_FREE[config.state_free]
    size = config.lr * config.projected_lr_scale * config.state_free_lr_scale
    fused = fused_for(weight)
    keep = 1.0 - config.lr * decay
    if fused is not None and rule.has_kernel and fused.sign_step_(weight, grad, size, keep):
        return
    decay_(weight, config.lr, decay)
    if rule.direction is not None:
        weight.add_(rule.direction(grad), alpha=-size)


def update_regular(params: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Moments], step: int,
                   decay: float, config: FrugalConfig) -> None:  # fmt: skip
    """Regular parameters, in fp32 or fp64: the state-full rule alone."""
    if _step_codes_(params, grads, moments, step, config.lr, decay, config):
        return
    wide = [_dense(param) for param in params]
    state_full_(wide, [_dense(grad) for grad in grads], moments, step, config.lr, decay, config)
    for param, result in zip(params, wide, strict=True):
        if result is not param:
            param.copy_(result)


def step_tiles(jobs: Iterable[TileUpdate]) -> None:
    """Weight decay; then what is projected moves by the state-full rule, the rest by the state-free one.

    Kernels take many tiles at once. In torch's operations they go one by one, so that buffers stay in the cache; only
    tiles that are state-full as they are wait for each other, and share one fused call.
    """
    launches: dict[torch.device, Any] = {}
    complete: dict[tuple[object, ...], list[TileUpdate]] = {}
    bases: list[TileUpdate] = []
    for job in jobs:
        if job.basis is not None:
            bases.append(job)
            continue
        device = job.weight.device
        started = launches.get(device, launches)
        if started is launches:  # the first on its device
            fused = fused_for(job.weight)
            started = launches[device] = None if fused is None else fused.Launches()
        if started is not None and started.take(job):
            continue
        assert job.noise is None, "torch's operations round to the nearest"
        if _moves_in_place(job):
            key = (id(job.config), job.decay, job.step, job.weight.dtype, device)
            complete.setdefault(key, []).append(job)
        else:
            _step_tile(job)
    for started in launches.values():
        if started is not None:
            started.finish()
    for group in complete.values():
        _step_complete(group)
    for batch in _batches(bases):
        _step_bases(batch)


def rounds_once(job: TileUpdate) -> bool:
    """Whether low-precision weights are rounded once, decay included: the kernels compute in fp32."""
    fused = fused_for(job.weight)
    return job.basis is None and fused is not None and fused.kind_of(job) is not None


def _moves_in_place(job: TileUpdate) -> bool:
    """Whether all of the tile is state-full, and the fused rules can take its tensors."""
    weight, grad = job.weight, job.grad
    if job.selection is None or not job.selection.complete:
        return False
    dense = weight.is_contiguous() and grad.is_contiguous()
    return dense and weight.dtype == grad.dtype == compute_dtype(weight.dtype)


def _step_complete(jobs: Sequence[TileUpdate]) -> None:
    config, weights = jobs[0].config, [job.weight for job in jobs]
    if jobs[0].decay != 0.0:
        torch._foreach_mul_(weights, 1.0 - config.lr * jobs[0].decay)
    state_full_(weights, [job.grad for job in jobs], [job.moments for job in jobs], jobs[0].step,
                config.lr * config.projected_lr_scale, 0.0, config)  # fmt: skip


def _step_tile(job: TileUpdate) -> None:
    """In torch's operations: the selected gradients are gathered, the fused rule computes their update, which joins the
    state-free one: the weights are read and written once.
    """
    weight, selection, config = job.weight, job.selection, job.config
    if selection is None:
        state_free_(weight, job.grad, config, job.decay)
        return
    decay_(weight, config.lr, job.decay)
    low = _dense(selection.take(job.grad))
    moved = _dense(weight) if selection.complete else torch.zeros_like(low)
    state_full_([moved], [low], [job.moments], job.step, config.lr * config.projected_lr_scale, 0.0, config)
    if selection.complete:
        selection.put_(weight, moved)
    else:
        add_coordinates_(weight, job.grad, selection, moved, config)


def add_coordinates_(weight: Tensor, grad: Tensor, selection: Selection, moved: Tensor, config: FrugalConfig) -> None:
    """Add the update ``moved`` (-lr s U, in R's shape) to the selected entries and the state-free step to the others.

    Both are put together in one small buffer that stays in the cache: writing scattered entries is cheap only there.
    """
    direction = STATE_FREE[config.state_free].direction
    if selection.complete:
        weight.add_(moved)
    elif direction is None:
        selection.put_(weight, (_wide(selection.take(weight)) + moved).to(weight.dtype))
    else:
        wide = _wide(grad)
        free = direction(wide)
        scale = -config.lr * config.projected_lr_scale * config.state_free_lr_scale
        delta = free.mul(scale) if free is grad else free.mul_(scale)
        selection.put_(delta, moved)
        weight.add_(delta)


def coordinate_share(grad: Tensor, selection: Selection, bounds: tuple[int, int], moments: Moments, step: int,
                     config: FrugalConfig) -> Tensor:  # fmt: skip
    """This replica's share of -lr s U: the range ``bounds`` of R along the selection's free dim."""
    low = _wide(selection.take(grad)).narrow(selection.free_dim, bounds[0], bounds[1] - bounds[0]).contiguous()
    return _from_zero([low], [moments], step, config, config.lr * config.projected_lr_scale)[0]


def _batches(jobs: Sequence[TileUpdate]) -> Iterator[list[TileUpdate]]:
    """Neighbours that share settings, of at most ``TOGETHER`` entries: they share calls of torch."""
    batch: list[TileUpdate] = []
    total, key = 0, None
    for job in jobs:
        size, now = job.weight.numel(), (id(job.config), job.decay, job.step, job.weight.dtype, job.weight.device)
        if batch and (now != key or total + size > TOGETHER):
            yield batch
            batch, total = [], 0
        batch.append(job)
        total, key = total + size, now
    if batch:
        yield batch


def _step_bases(jobs: Sequence[TileUpdate]) -> None:
    """Weight decay and basis projections of tiles with the same settings, in place."""
    first, config, decay = jobs[0], jobs[0].config, jobs[0].decay
    if first.weight.dtype != compute_dtype(first.weight.dtype) or config.by_lines:
        for job in jobs:
            decay_(job.weight, config.lr, decay)
            job.weight.add_(basis_delta(job))
        return
    pairs = [(job, _columns(cast("Basis", job.basis), job.grad)) for job in jobs]
    grads = [job.grad if job.grad.dtype is job.weight.dtype else _wide(job.grad) for job in jobs]
    lows = [down(grad, basis, config.matmul) for (_, basis), grad in zip(pairs, grads, strict=True)]
    free = STATE_FREE[config.state_free].direction is not None
    weights: list[Tensor] = []
    rests: list[Tensor] = []
    for (job, basis), grad, low in zip(pairs, grads, lows, strict=True):
        if not free or spans_everything(basis):
            decay_(job.weight, config.lr, decay)
            continue
        rest = residual(grad, low, basis, config.matmul)
        if config.residual_threshold == 0.0:
            weights.append(job.weight)
            rests.append(rest)
        elif not _free_rows_(job.weight, rest, grad, job.side, config, decay):
            state_free_(job.weight, silence_noise_(rest, grad, job.side, config.residual_threshold), config, decay)
    _free_all_(weights, rests, config, decay)
    del rests
    rate = config.lr * config.projected_lr_scale
    moved = _from_zero(lows, [job.moments for job in jobs], first.step, config, rate)
    for (job, basis), update in zip(pairs, moved, strict=True):
        add_up_(job.weight, update, basis, matmul=config.matmul)


def _free_all_(weights: Sequence[Tensor], grads: Sequence[Tensor], config: FrugalConfig, decay: float) -> None:
    """``state_free_`` of all of them, in one call of a kernel that takes them all."""
    if len(weights) > 1 and STATE_FREE[config.state_free].has_kernel:
        fused = fused_for(weights[0])
        if fused is not None and fused.sign_steps_(weights, grads, config, decay):
            return
    for weight, grad in zip(weights, grads, strict=True):
        state_free_(weight, grad, config, decay)


def _free_rows_(weight: Tensor, rest: Tensor, grad: Tensor, side: str, config: FrugalConfig, decay: float) -> bool:
    """``silence_noise_`` and ``state_free_`` in one kernel, where there is one: by rows, with a threshold."""
    if side == "left" or not STATE_FREE[config.state_free].has_kernel:
        return False
    fused = fused_for(weight)
    size, keep = config.lr * config.projected_lr_scale * config.state_free_lr_scale, 1.0 - config.lr * decay
    return fused is not None and fused.sign_step_above_(weight, rest, grad, size, keep, config.residual_threshold)


def basis_delta(job: TileUpdate) -> Tensor:
    """The same as a tensor to add to the weights (without weight decay), for weights that lie elsewhere, and for rules
    that need whole lines.
    """
    config, grad = job.config, _wide(job.grad)
    if config.by_lines:
        return alone(lines_delta(job))
    basis = _columns(cast("Basis", job.basis), grad)
    low = down(grad, basis, config.matmul)
    rule, rate = STATE_FREE[config.state_free], config.lr * config.projected_lr_scale
    update = _from_zero([low], [job.moments], job.step, config, rate)[0]
    if rule.direction is None or spans_everything(basis):
        delta = torch.zeros_like(grad, memory_format=torch.contiguous_format)
    else:
        rest = silence_noise_(residual(grad, low, basis, config.matmul), grad, job.side, config.residual_threshold)
        delta = rule.direction(rest).mul_(-rate * config.state_free_lr_scale)
    return add_up_(delta, update, basis, matmul=config.matmul)


def lines_delta(job: TileUpdate, cut: int | None = None) -> Sums:
    """The same by rules that need whole lines; it asks for sums along the dim that is cut."""
    config, grad, rate = job.config, _wide(job.grad), job.config.lr * job.config.projected_lr_scale
    basis, treatment, part = _columns(cast("Basis", job.basis), grad), config.treatment, Part(job.shape, job.side, cut)
    low = down(grad, basis, config.matmul)
    update = _from_zero([low], [job.moments], job.step, config, 1.0)[0] if low.numel() else low  # -U, whatever lr is
    scales = config.combine != "add"
    if treatment.leaves_nothing(part, low.shape[0 if job.side == "left" else 1]):
        rest = torch.zeros_like(grad, memory_format=torch.contiguous_format)
    else:
        if scales:
            rest = grad.clone(memory_format=torch.contiguous_format)
        else:
            rest = residual(grad, low, basis, config.matmul)
            rest = silence_noise_(rest, grad, job.side, config.residual_threshold)
        unit = 1.0
        if scales or treatment.rule.scaled:
            unit = STATE_FULL[config.state_full].correction(job.step, config)
        rest = yield from treatment.directed(rest, low, update, part, job.free or {}, config, unit)
    rest.mul_(-rate if scales else -rate * config.state_free_lr_scale)
    return rest if scales or not low.numel() else add_up_(rest, update, basis, alpha=rate, matmul=config.matmul)


def _from_zero(lows: Sequence[Tensor], moments: Sequence[Moments], step: int, config: FrugalConfig,
               rate: float) -> Sequence[Tensor]:  # fmt: skip
    """-rate U(low), by moving zeros: the fused rules only know how to move parameters."""
    shape, count = lows[0].shape, len(lows)
    if all(low.shape == shape for low in lows):
        moved: Sequence[Tensor] = lows[0].new_zeros((count, *shape)).unbind()
    else:
        sizes = [low.numel() for low in lows]
        parts = lows[0].new_zeros(sum(sizes)).split(sizes)
        moved = [part.view(low.shape) for part, low in zip(parts, lows, strict=True)]
    state_full_(moved, lows, moments, step, rate, 0.0, config)
    return moved


def _columns(basis: Basis, grad: Tensor) -> Basis:
    """The basis of a tile's gradient as columns."""
    return basis if basis.dictionary is None else basis.shown(grad.shape[0], grad.shape[1], compute_dtype(grad.dtype))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor.dtype))


def _dense(tensor: Tensor) -> Tensor:
    """Wide and contiguous: the fused rules walk memory without looking at strides."""
    return _wide(tensor).contiguous()
