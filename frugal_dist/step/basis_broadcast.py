"""The broadcast of new bases by their owners, and how the state follows.

A failed SVD is a status that all ranks learn; no rank raises or skips alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from frugal_dist.projection.basis import Basis, basis_of, basis_shapes
from frugal_dist.sharding.collectives import broadcast
from frugal_dist.step.moments import carry_basis_moments
from frugal_dist.step.runtime import LocalMatrix, Runtime, basis_route

NEW, FAILED = 0.0, 1.0
ATTEMPTS = 3
"""Consecutive failed refreshes of one matrix after which all ranks raise."""


def used_by_others(runtime: Runtime, mat: LocalMatrix) -> bool:
    """Whether any rank but the owner computes with this matrix' basis."""
    return any(tiles for rank, tiles in enumerate(basis_route(runtime, mat).layout) if rank != mat.matrix.owner)


def broadcast_bases(runtime: Runtime, mats: Sequence[LocalMatrix], fresh: Sequence[Basis | None], owner: int) -> None:
    """Owner's statuses and bases to everyone, then the state follows. All ranks use the same contiguous bytes."""
    like = torch.empty(0, dtype=mats[0].dtype, device=mats[0].device)
    status = torch.tensor([FAILED if basis is None else NEW for basis in fresh], dtype=like.dtype, device=like.device)
    pieces, bases = [status], []
    for mat, basis in zip(mats, fresh, strict=True):
        shapes = basis_shapes(mat.side, mat.matrix.rows, mat.matrix.cols, mat.size)
        travels = used_by_others(runtime, mat)
        if basis is None:  # where it does not travel, nobody here computes with it
            sizes = {name: shape if travels else (0, 0) for name, shape in shapes.items()}
            basis = basis_of({n: torch.zeros(size, dtype=mat.dtype, device=mat.device) for n, size in sizes.items()})
        bases.append(basis)
        if travels:
            pieces += basis.parts
    broadcast(runtime.ranks, owner, pieces, like)
    for mat, basis, code in zip(mats, bases, status.tolist(), strict=True):
        adopt(runtime, mat, basis.to(mat.basis_dtype)) if code == NEW else count_failure(runtime, mat, owner)


def adopt(runtime: Runtime, mat: LocalMatrix, kept: Basis) -> None:
    """A new basis, as it is kept: the state follows."""
    runtime.failures.pop(mat.matrix.index, None)
    plan, basis = basis_route(runtime, mat), mat.usable(kept)  # everyone computes with what is kept
    carry_basis_moments(mat, plan, basis)
    if plan.tiles and kept.parts:
        if runtime.ranks.rank == next(rank for rank, tiles in enumerate(plan.layout) if tiles):
            runtime.refresh_stats.add_turn(mat.basis(), basis)
        mat.state.set_basis(mat.side, kept)
    mat.state.count_refresh(mat.size)


def count_failure(runtime: Runtime, mat: LocalMatrix, owner: int) -> None:
    """Go on with the old projector; raise on all ranks together when it keeps failing."""
    count = runtime.failures.get(mat.matrix.index, 0) + 1
    runtime.failures[mat.matrix.index] = count
    if count >= ATTEMPTS:
        raise RuntimeError(
            f"{mat.matrix.name}: the projector refresh failed {count} times in a row on rank {owner} (its warnings "
            "say why). Lower the learning rate, clip gradients, or choose a projection that needs no SVD (columns)."
        )
