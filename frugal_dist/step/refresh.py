"""The projector refresh: when, by whom, with what status. Decided together, computed once by an owner, broadcast.

A NaN, a zero gradient or a failed SVD is a status that all ranks learn; no rank raises or skips alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig
from frugal_dist.notices import notice
from frugal_dist.projection.basis import Basis, basis_shapes
from frugal_dist.sharding.collectives import agree_max, all_to_all, broadcast, gather_objects
from frugal_dist.sharding.placement import owner_layout, transfers_for
from frugal_dist.sharding.redistribution import fill_buckets, limit_for_owners
from frugal_dist.sharding.tile import owned, whole
from frugal_dist.step.basis_refresh import compute_basis
from frugal_dist.step.inputs import LocalParameter
from frugal_dist.step.moments import carry_basis_moments, may_move_between_ranks, move_coordinate_moments
from frugal_dist.step.replicas import fingerprints, mismatched, replicated, resynchronise
from frugal_dist.step.runtime import (
    Agreed,
    LocalMatrix,
    LocalSelection,
    Runtime,
    basis_route,
    local_selection,
    moment_names,
)

NEW, FAILED = 0.0, 1.0
_FROZEN, _TRAINED, _GRADIENT = 0, 1, 2
"""What a rank says of a matrix: frozen without a gradient, not frozen but without one, or it has one."""
ATTEMPTS = 3
"""Consecutive failed refreshes of one matrix after which all ranks raise."""


@dataclass
class Report:
    """What all ranks agreed on about one matrix in this call. ``present``: some rank has a gradient."""

    updates: int
    present: bool = False
    trained: bool = True
    finite: bool = True
    zero: bool = False


def refresh(runtime: Runtime, works: Sequence[LocalMatrix], regular: Sequence[LocalParameter]) -> list[LocalMatrix]:
    """Refresh what is due; return the works to be stepped now (without those that have no gradient or are skipped).

    ``regular``: the call's regular parameters. Nothing of them is refreshed, but their settings are compared as well.
    """
    suspects = _suspects(runtime, works)
    reports = _agree(runtime, suspects, regular) if suspects else {}
    _refresh_coordinates(runtime, works, reports)
    due_bases = [work for work in suspects if work.family == "basis" and work.is_due()]
    _refresh_bases(runtime, [work for work in due_bases if _usable(work, reports[work.matrix.index])])
    _remember(runtime, suspects, reports)
    return [work for work in works if work.grads is not None and _can_step(work, reports)]


# --- deciding together -----------------------------------------------------------------------------


def _takes_part(runtime: Runtime, work: LocalMatrix) -> bool:
    """Whether a matrix' refresh needs all ranks: bases, replicas that compare their weights, moments that may move.

    The answer does not depend on counts or on the density of the day: ranks that refreshed by themselves for a while,
    and had no gradient at different times, could not exchange moments afterwards.
    """
    if work.family == "basis":
        return True
    return not runtime.ranks.alone and (work.matrix.copies > 1 or may_move_between_ranks(work))


def numbers_agreed(runtime: Runtime, works: Sequence[LocalMatrix]) -> int:
    """How many integers the ranks agree on at a refresh of all ``works``; 0: it needs no agreement."""
    suspects = [work for work in works if _takes_part(runtime, work)]
    if runtime.ranks.alone or not suspects:
        return 0
    return 2 + 5 * len(suspects) + 2 * len(replicated(runtime, suspects))


def _suspects(runtime: Runtime, works: Sequence[LocalMatrix]) -> list[LocalMatrix]:
    """The matrices that may be due, judged from counts that were agreed on: the same list on every rank.

    A missing gradient can only delay a matrix, so counting every call as an update never comes too late. As with
    torch's optimizers a gradient decides whether a parameter is stepped, frozen or not, and ranks may differ in that.
    They do not differ in freezing (requires_grad), a decision of the program: what is frozen and had no gradient on any
    rank when it was asked for is left out, so that frozen weights beside adapters cost nothing.
    """
    if runtime.ranks.alone:  # coordinates never take part
        return [work for work in works if work.family == "basis" and work.grads is not None and work.is_due()]
    found = []
    for work in works:
        known = runtime.agreed.get(work.matrix.index)
        if known is not None and known.asleep and work.frozen:
            suspect = False
        else:
            suspect = known is None or work.is_due(known.updates + known.calls, known.refreshed_at)
        if suspect and _takes_part(runtime, work):
            found.append(work)
        elif known is not None:
            known.calls += 1
    return found


def _agree(runtime: Runtime, suspects: Sequence[LocalMatrix], regular: Sequence[LocalParameter]) -> dict[int, Report]:
    """One small all-reduce: counts, presence and health of the gradients, equality of settings and of replicas."""
    settings = _settings(suspects, regular)
    mark = 0 if runtime.ranks.alone else zlib.crc32(repr(settings).encode())
    values = [mark, -mark]
    for work, (finite, nonzero) in zip(suspects, _gradient_health(suspects), strict=True):
        updates = work.state.counter("updates")
        presence = _GRADIENT if work.grads is not None else _FROZEN if work.frozen else _TRAINED
        values += [updates, -updates, presence, int(not finite), int(nonzero)]
    compared = [] if runtime.ranks.alone else suspects
    agreed = agree_max(runtime.ranks, [*values, *fingerprints(runtime, compared)], suspects[0].device)
    if agreed[0] != -agreed[1]:
        raise ValueError(
            f"The ranks have different hyperparameters at this refresh: {_difference(runtime, settings)}. Change them "
            "on all ranks alike."
        )
    agreed = agreed[2:]
    reports = {}
    for position, work in enumerate(suspects):
        most, negative_least, presence, bad, moving = agreed[5 * position : 5 * position + 5]
        if most != -negative_least:
            _notice(
                runtime, f"{work.matrix.name}: ranks counted {-negative_least} to {most} updates; all go on with {most}"
            )
            work.state.set_counter("updates", most)
        if bad and work.is_due():
            _notice(
                runtime,
                f"{work.matrix.name}: its gradient has NaN or infinite entries at a projector refresh. All ranks leave "
                "the matrix alone on this step and try again on the next.",
            )
        reports[work.matrix.index] = Report(most, presence == _GRADIENT, presence != _FROZEN, not bad, not moving)
    resynchronise(runtime, mismatched(runtime, compared, agreed[5 * len(suspects) :]))
    return reports


Settings = list[tuple[str, FrugalConfig, float]]


def _settings(suspects: Sequence[LocalMatrix], regular: Sequence[LocalParameter]) -> Settings:
    """By name what all ranks step with: replicas that are stepped otherwise on one of them drift apart."""
    found = [(work.matrix.name, work.config, work.decay) for work in suspects]
    return found + [(one.name, one.config, one.decay) for one in regular]


def _difference(runtime: Runtime, settings: Settings) -> str:
    """The first hyperparameter that is another one on some rank. Collective."""
    own = [(name, vars(config) | {"weight_decay": decay}) for name, config, decay in settings]
    everyone = gather_objects(runtime.ranks, own)
    for rank, theirs in enumerate(everyone):
        for (name, first), (_, options) in zip(everyone[0], theirs, strict=False):
            for key, value in first.items():
                if options[key] != value:
                    return f"{key} of {name} is {value!r} on rank 0, {options[key]!r} on rank {rank}"
    return "learning rate, density, ..."


def _gradient_health(works: Sequence[LocalMatrix]) -> list[tuple[bool, bool]]:
    """(finite, nonzero) of every work's local gradient, with one transfer to the host."""
    flags: list[Tensor] = []
    spans: list[tuple[int, int]] = []
    for work in works:
        checked = work.grads if work.family == "basis" and work.grads is not None else []
        # On one device: a process may have a model on several GPUs.
        ends = (torch.stack(torch.aminmax(grad)).to(works[0].device) for grad in checked if grad.numel())
        found = [torch.stack([torch.isfinite(both).all(), (both != 0).any()]) for both in ends]
        spans.append((len(flags), len(flags) + len(found)))
        flags += found
    host = torch.stack(flags).cpu() if flags else torch.empty(0, 2, dtype=torch.bool, device="cpu")
    return [(bool(host[a:b, 0].all()), bool(host[a:b, 1].any())) for a, b in spans]


def _usable(work: LocalMatrix, report: Report) -> bool:
    return not work.empty and report.present and report.finite and not report.zero


def _can_step(work: LocalMatrix, reports: dict[int, Report]) -> bool:
    """Skip a matrix whose gradient is not finite at its refresh, and one that never had a projector."""
    if not reports:
        return work.state.counts["refreshes"] > 0 or work.matrix.empty
    if work.empty:
        return True
    report = reports.get(work.matrix.index)
    spoilt = report is not None and not report.finite and work.is_due()  # asked for too early: not due, not skipped
    return work.state.counter("refreshes") > 0 and not spoilt


def _remember(runtime: Runtime, suspects: Sequence[LocalMatrix], reports: dict[int, Report]) -> None:
    """Note what was agreed, this call's update included."""
    for work in suspects:
        report = reports[work.matrix.index]
        advanced = int(report.present and _can_step(work, reports))
        updates, refreshed_at = report.updates + advanced, work.state.counter("refreshed_at")
        runtime.agreed[work.matrix.index] = Agreed(updates, refreshed_at, asleep=not report.trained)


# --- coordinates and blocks: nothing to compute, only to draw --------------------------------------


def _refresh_coordinates(runtime: Runtime, works: Sequence[LocalMatrix], reports: dict[int, Report]) -> None:
    for work in works:
        if work.family == "basis" or not work.is_due():
            continue
        report = reports.get(work.matrix.index)
        if report is None and _takes_part(runtime, work):
            continue  # frozen, and no rank had a gradient when it was asked for
        present = work.grads is not None if report is None else report.present
        if present:
            old = local_selection(runtime, work).pieces
            before = (work.state.counter("refreshes"), work.state.counter("size"))
            _advance(work, work.size)
            new = local_selection(runtime, work)
            move_coordinate_moments(runtime, work, old, new.pieces, before)
            _count_coordinates(runtime, work, new)


def _count_coordinates(runtime: Runtime, work: LocalMatrix, cut: LocalSelection) -> None:
    """Figures of this rank's tiles, each by the first of the ranks that hold it."""
    held = work.matrix.held
    for piece in cut.pieces if work.grads is not None else ():
        if held[piece.tile][0] == runtime.ranks.rank:
            grad = work.local_grad(piece.tile)
            runtime.figures.add_part([grad], [] if cut.nothing else [piece.selection.take(grad)])


def _advance(work: LocalMatrix, size: int) -> None:
    state = work.state
    state.set_counter("refreshes", state.counter("refreshes") + 1)
    state.set_counter("refreshed_at", state.counter("updates"))
    state.set_counter("size", size)


# --- bases: gathered by their owner, computed once, published --------------------------------------


def _refresh_bases(runtime: Runtime, works: Sequence[LocalMatrix]) -> None:
    """In bounded buckets, so that scratch stays small and a long SVD never runs into a collective's time-out."""
    for bucket in buckets_of(runtime, works):
        _refresh_bucket(runtime, bucket)


def buckets_of(runtime: Runtime, works: Sequence[LocalMatrix]) -> list[list[LocalMatrix]]:
    """The matrices that are gathered and published together."""
    found = []
    for dtype in sorted({work.dtype for work in works}, key=str):
        same = [work for work in works if work.dtype == dtype]
        loads = [refresh_load(runtime, work) for work in same]
        limit = limit_for_owners(loads, runtime.bucket_bytes // dtype.itemsize)
        found += [[same[i] for i in bucket] for bucket in fill_buckets(loads, limit)]
    return found


def refresh_load(runtime: Runtime, work: LocalMatrix) -> tuple[int, ...]:
    """Elements that each rank may hold for this refresh: the whole matrix at the owner, and parts that travel to it."""
    matrix = work.matrix
    travels = owned(matrix.storage[matrix.owner], whole(matrix.rows, matrix.cols)[0]) is None
    parts = list(matrix.sizes) if travels else [0] * len(matrix.sizes)
    parts[matrix.owner] += matrix.rows * matrix.cols
    return tuple(parts)


def _refresh_bucket(runtime: Runtime, works: Sequence[LocalMatrix]) -> None:
    """All owners compute at the same time; only then the first of them publishes."""
    gathered, warm = _gather(runtime, works)
    found = {
        work.matrix.index: compute_basis(
            work, gathered[work.matrix.index], warm.get(work.matrix.index), runtime.figures
        )
        for work in works
        if work.matrix.owner == runtime.ranks.rank
    }
    for owner in range(runtime.ranks.size):
        mine = [work for work in works if work.matrix.owner == owner]
        if mine:
            _publish(runtime, mine, [found.get(work.matrix.index) for work in mine], owner)


def warm_source(runtime: Runtime, work: LocalMatrix) -> int | None:
    """The rank that has the old basis when a refresh starts from it and the owner does not; None: nothing to send."""
    matrix = work.matrix
    if work.config.svd_method != "subspace" or work.config.projection != "svd" or work.state.counter("refreshes") == 0:
        return None
    users = [rank for rank, tiles in enumerate(basis_route(runtime, work).layout) if tiles]
    return None if matrix.owner in users else users[0]


def _send_warm(runtime: Runtime, work: LocalMatrix, send: list[list[Tensor]], recv: list[list[Tensor]]) -> Basis | None:
    """Queue the old basis for its owner; returns the one that this rank, if it is the owner, will start from."""
    source, rank = warm_source(runtime, work), runtime.ranks.rank
    if source is None:
        return work.basis()
    if rank == source:
        basis = work.basis()
        assert basis is not None
        send[work.matrix.owner] += basis.parts
    if rank != work.matrix.owner:
        return None
    shapes = basis_shapes(work.side, work.matrix.rows, work.matrix.cols, work.state.counter("size"))
    basis = Basis(**{part: torch.empty(size, dtype=work.dtype, device=work.device) for part, size in shapes.items()})
    recv[source] += basis.parts
    return basis


def _gather(runtime: Runtime, works: Sequence[LocalMatrix]) -> tuple[dict[int, Tensor], dict[int, Basis | None]]:
    """The whole gradients of the matrices this rank owns, and the bases that their refresh starts from."""
    ranks = runtime.ranks
    send: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    recv: list[list[Tensor]] = [[] for _ in range(ranks.size)]
    found, landing = {}, []
    warm: dict[int, Basis | None] = {}
    travels = False
    for work in works:
        warm[work.matrix.index] = _send_warm(runtime, work, send, recv)
        travels = travels or warm_source(runtime, work) is not None
        matrix = work.matrix
        everything = whole(matrix.rows, matrix.cols)[0]
        home = owned(matrix.storage[matrix.owner], everything)
        if home is not None:
            if matrix.owner == ranks.rank:
                found[matrix.index] = work.local_grad(home)
            continue
        travels = True
        if matrix.owner == ranks.rank:
            found[matrix.index] = torch.empty(matrix.rows, matrix.cols, dtype=work.dtype, device=work.device)
        target = owner_layout(ranks.size, matrix.owner, matrix.rows, matrix.cols)
        for move in transfers_for(matrix.held, target, ranks.rank, matrix.index):
            if move.source == ranks.rank:
                piece = work.local_grad(move.source_tile)[move.area.within(move.source_tile)]
                if move.target == ranks.rank:
                    found[matrix.index][move.area.within(everything)] = piece
                else:
                    send[move.target].append(piece)
            else:
                landing.append(found[matrix.index][move.area.within(everything)])
                recv[move.source].append(landing[-1])
    if travels:
        all_to_all(ranks, send, recv, torch.empty(0, dtype=works[0].dtype, device=works[0].device))
    return found, warm


def used_by_others(runtime: Runtime, work: LocalMatrix) -> bool:
    """Whether any rank but the owner computes with this matrix' basis."""
    return any(tiles for rank, tiles in enumerate(basis_route(runtime, work).layout) if rank != work.matrix.owner)


def _publish(runtime: Runtime, works: Sequence[LocalMatrix], found: Sequence[Basis | None], owner: int) -> None:
    """Owner's statuses and bases to everyone, then the state follows. All ranks use the same contiguous bytes."""
    like = torch.empty(0, dtype=works[0].dtype, device=works[0].device)
    status = torch.tensor([FAILED if basis is None else NEW for basis in found], dtype=like.dtype, device=like.device)
    pieces, bases = [status], []
    for work, basis in zip(works, found, strict=True):
        shapes = basis_shapes(work.side, work.matrix.rows, work.matrix.cols, work.size)
        travels = used_by_others(runtime, work)
        if basis is None:  # where it does not travel, nobody here computes with it
            sizes = {name: shape if travels else (0, 0) for name, shape in shapes.items()}
            basis = Basis(**{n: torch.zeros(size, dtype=work.dtype, device=work.device) for n, size in sizes.items()})
        bases.append(basis)
        if travels:
            pieces += basis.parts
    broadcast(runtime.ranks, owner, pieces, like)
    for work, basis, code in zip(works, bases, status.tolist(), strict=True):
        _adopt(runtime, work, basis) if code == NEW else _count_failure(runtime, work, owner)


def _adopt(runtime: Runtime, work: LocalMatrix, basis: Basis) -> None:
    runtime.failures.pop(work.matrix.index, None)
    plan, kept = basis_route(runtime, work), basis.to(work.basis_dtype)
    basis = kept.to(work.dtype)  # everyone computes with what is kept
    carry_basis_moments(work, plan, basis, moment_names(work.config))
    if plan.tiles:
        if runtime.ranks.rank == next(rank for rank, tiles in enumerate(plan.layout) if tiles):
            runtime.figures.add_turn(work.basis(), basis)
        work.state.set_basis(work.side, kept)
    _advance(work, work.size)


def _count_failure(runtime: Runtime, work: LocalMatrix, owner: int) -> None:
    """Go on with the old projector; raise on all ranks together when it keeps failing."""
    count = runtime.failures.get(work.matrix.index, 0) + 1
    runtime.failures[work.matrix.index] = count
    if count >= ATTEMPTS:
        raise RuntimeError(
            f"{work.matrix.name}: the projector refresh failed {count} times in a row on rank {owner} (its warnings "
            "say why). Lower the learning rate, clip gradients, or choose a projection that needs no SVD (columns)."
        )


def _notice(runtime: Runtime, text: str) -> None:
    if runtime.ranks.rank == 0:
        notice(text)
