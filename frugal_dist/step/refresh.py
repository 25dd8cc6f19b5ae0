"""The refresh of projectors: every rank draws coordinates for itself; an owner finds a basis for all."""

from __future__ import annotations

from frugal_dist.projection.basis import Basis
from frugal_dist.step.basis_refresh import adopt, refresh_bases
from frugal_dist.step.column_refresh import refresh_columns
from frugal_dist.step.decide import Decision
from frugal_dist.step.moments import move_coordinate_moments
from frugal_dist.step.runtime import LocalMatrix, LocalSelection, Runtime, local_selection


def refresh(runtime: Runtime, decision: Decision) -> None:
    """Refresh what was decided on."""
    for work in decision.coordinates:
        old = local_selection(runtime, work).pieces
        before = (work.state.counter("refreshes"), work.state.counter("size"))
        work.state.count_refresh(work.size)
        new = local_selection(runtime, work)
        move_coordinate_moments(runtime, work, old, new.pieces, before)
        _count_coordinates(runtime, work, new)
    for work in decision.bases:
        if not work.chooses:
            adopt(runtime, work, Basis())
    refresh_bases(runtime, [work for work in decision.bases if work.chooses and not work.numbered])
    refresh_columns(runtime, [work for work in decision.bases if work.numbered])


def _count_coordinates(runtime: Runtime, work: LocalMatrix, cut: LocalSelection) -> None:
    """Figures of this rank's tiles, each by the first of the ranks that hold it."""
    held = work.matrix.held
    for piece in cut.pieces if work.grads is not None else ():
        if held[piece.tile][0] == runtime.ranks.rank:
            grad = work.local_grad(piece.tile)
            runtime.figures.add_part([grad], [] if cut.nothing else [piece.selection.take(grad)])
