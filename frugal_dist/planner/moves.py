"""Moments that change ranks at a refresh of coordinates, on all ranks at once: who holds what before and after it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from frugal_dist.planner.totals import ITEM
from frugal_dist.projection.coordinates import Selection
from frugal_dist.sharding.tile import whole
from frugal_dist.work import CoordinatePiece, Runtime, Work, cut_selection, moment_names, whole_selection


def moments_sent(runtime: Runtime, work: Work) -> list[int]:
    """Bytes that each rank sends to others at the second refresh, by "keep" or "project". Later ones draw anew.

    Replicas that do not share send what they hold to everyone who holds it afterwards, each of them the same.
    """
    work = replace(work, device=torch.device("cpu"))  # what is drawn counts, also where tensors are empty
    old, new = (whole_selection(work, refresh, work.size) for refresh in (0, 1))
    before, after = _holder_of_each(runtime, work, old), _holder_of_each(runtime, work, new)
    if work.config.on_refresh == "project":  # a moment follows its entry, with "keep" its place in R
        before, after = _by_entry(work, old, before), _by_entry(work, new, after)
    wanted = before[(before >= 0) & (after >= 0)]
    staying = before[(before >= 0) & (before == after)]
    size, copies = runtime.ranks.size, 1 if runtime.shard_replicas else work.matrix.copies
    sent = copies * torch.bincount(wanted, minlength=size) - torch.bincount(staying, minlength=size)
    entry = ITEM * len(moment_names(work.config))
    return [entry * int(sent[first]) for first in _firsts(work, size, alone=copies == 1)]


def _firsts(work: Work, size: int, alone: bool) -> list[int]:
    """For every rank the first one that holds the same: itself if it is ``alone`` with its moments."""
    found = list(range(size))
    for ranks in () if alone else work.matrix.held.values():
        for rank in ranks:
            found[rank] = ranks[0]
    return found


def _holder_of_each(runtime: Runtime, work: Work, selection: Selection) -> Tensor:
    """For every entry of R, flat, the rank that holds its moments; the first one of replicas that do not share."""
    matrix = work.matrix
    (everything,), held = whole(matrix.rows, matrix.cols), matrix.held
    where = torch.empty(matrix.rows, matrix.cols, dtype=torch.int32, device="cpu")
    for number, tile in enumerate(held):
        where[tile.within(everything)] = number
    tiles = selection.take(where).reshape(-1)
    found = torch.tensor([ranks[0] for ranks in held.values()], device="cpu")[tiles]
    if runtime.shard_replicas and matrix.copies > 1:
        for number, (tile, ranks) in enumerate(held.items()):
            (piece,) = (one for one in cut_selection(runtime, work, selection, ranks[0]) if one.tile == tile)
            found[tiles == number] = _sharers(piece)
    return found


def _sharers(piece: CoordinatePiece) -> Tensor:
    """Which of its holders has the state of each entry of a piece, flat."""
    widths = torch.tensor([stop - start for start, stop in piece.bounds], device="cpu")
    line = torch.tensor(piece.holders, device="cpu").repeat_interleave(widths)
    lying = [-1 if dim == piece.selection.free_dim else 1 for dim in range(len(piece.shape))]
    return line.view(lying).expand(piece.shape).reshape(-1)


def _by_entry(work: Work, selection: Selection, held: Tensor) -> Tensor:
    """``held`` of the entries of R, as that of all entries of the matrix; -1 for those that are not selected."""
    rows, cols = work.matrix.rows, work.matrix.cols
    found = torch.full((rows, cols), -1, dtype=held.dtype, device="cpu")
    selection.put_(found, held.view(selection.shape(rows, cols)))
    return found.view(-1)
