"""The refresh of projectors: every rank draws coordinates for itself; an owner finds a basis for all."""

from __future__ import annotations

from frugal_dist.projection.basis import Basis
from frugal_dist.step.basis_broadcast import adopt
from frugal_dist.step.basis_refresh import refresh_bases
from frugal_dist.step.column_refresh import refresh_columns
from frugal_dist.step.decide import Decision
from frugal_dist.step.moments import move_coordinate_moments
from frugal_dist.step.runtime import LocalMatrix, LocalSelection, Runtime, local_selection


def refresh(runtime: Runtime, decision: Decision) -> None:
    """Refresh what was decided on."""
    for mat in decision.coordinates:
        old = local_selection(runtime, mat).pieces
        before = (mat.state.counter("refreshes"), mat.state.counter("size"))
        mat.state.count_refresh(mat.size)
        new = local_selection(runtime, mat)
        move_coordinate_moments(runtime, mat, old, new.pieces, before)
        _count_coordinates(runtime, mat, new)
    for mat in decision.bases:
        if not mat.chooses:
            adopt(runtime, mat, Basis())
    refresh_bases(runtime, [mat for mat in decision.bases if mat.chooses and not mat.numbered])
    refresh_columns(runtime, [mat for mat in decision.bases if mat.numbered])


def _count_coordinates(runtime: Runtime, mat: LocalMatrix, cut: LocalSelection) -> None:
    """Figures of this rank's tiles, each by the first of the ranks that hold it."""
    held = mat.matrix.held
    for piece in cut.pieces if mat.grads is not None else ():
        if held[piece.tile][0] == runtime.ranks.rank:
            grad = mat.local_grad(piece.tile)
            runtime.refresh_stats.add_part([grad], [] if cut.nothing else [piece.selection.take(grad)])
