"""Who is refreshed at this call, and who is stepped: decided together, from counts and gradients that all ranks tell.

A NaN or a zero gradient is a status that all ranks learn; no rank raises or skips alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig
from frugal_dist.notices import notice
from frugal_dist.sharding.collectives import agree_max, gather_objects
from frugal_dist.step.moments import may_move_between_ranks
from frugal_dist.step.replicas import fingerprints, mismatched, replicated, resynchronise
from frugal_dist.step.runtime import Agreed, LocalMatrix, LocalParameter, Runtime

_FROZEN, _TRAINED, _GRADIENT = 0, 1, 2
"""What a rank says of a matrix: frozen without a gradient, not frozen but without one, or it has one."""


@dataclass
class Report:
    """What all ranks agreed on about one matrix in this call. ``present``: some rank has a gradient."""

    updates: int
    present: bool = False
    trained: bool = True
    finite: bool = True
    zero: bool = False


@dataclass
class Decision:
    """What is refreshed now. ``suspects``: the matrices that all ranks asked each other about, with their reports."""

    coordinates: list[LocalMatrix]
    bases: list[LocalMatrix]
    suspects: list[LocalMatrix]
    reports: dict[int, Report]


def decide(runtime: Runtime, mats: Sequence[LocalMatrix], regular: Sequence[LocalParameter]) -> Decision:
    """What this call refreshes. ``regular``: nothing of them is refreshed, but their settings are compared as well."""
    suspects = _suspects(runtime, mats)
    reports = _agree(runtime, suspects, regular) if suspects else {}
    return Decision(
        [mat for mat in mats if mat.family != "basis" and mat.is_due() and _present(runtime, mat, reports)],
        [mat for mat in suspects if mat.family == "basis" and mat.is_due() and _usable(mat, reports)],
        suspects,
        reports,
    )


def stepping(runtime: Runtime, mats: Sequence[LocalMatrix], decision: Decision) -> list[LocalMatrix]:
    """After the refresh: the matrices to be stepped, without those that have no gradient or are skipped. Notes what was
    agreed, this call's update included.
    """
    reports = decision.reports
    for mat in decision.suspects:
        report = reports[mat.matrix.index]
        advanced = int(report.present and _can_step(mat, reports))
        updates, refreshed_at = report.updates + advanced, mat.state.counter("refreshed_at")
        runtime.agreed[mat.matrix.index] = Agreed(updates, refreshed_at, asleep=not report.trained)
    return [mat for mat in mats if mat.grads is not None and _can_step(mat, reports)]


def _takes_part(runtime: Runtime, mat: LocalMatrix) -> bool:
    """Whether a matrix' refresh needs all ranks: bases, replicas that compare their weights, moments that may move.

    The answer does not depend on counts or on the density of the day: ranks that refreshed by themselves for a while,
    and had no gradient at different times, could not exchange moments afterwards.
    """
    if mat.family == "basis":
        return True
    return not runtime.ranks.alone and (mat.matrix.copies > 1 or may_move_between_ranks(mat))


def numbers_agreed(runtime: Runtime, mats: Sequence[LocalMatrix]) -> int:
    """How many integers the ranks agree on at a refresh of all ``mats``; 0: it needs no agreement."""
    suspects = [mat for mat in mats if _takes_part(runtime, mat)]
    if runtime.ranks.alone or not suspects:
        return 0
    return 2 + 5 * len(suspects) + 2 * len(replicated(runtime, suspects))


def _suspects(runtime: Runtime, mats: Sequence[LocalMatrix]) -> list[LocalMatrix]:
    """The matrices that may be due, judged from counts that were agreed on: the same list on every rank.

    A missing gradient can only delay a matrix, so counting every call as an update never comes too late. As with
    torch's optimizers a gradient decides whether a parameter is stepped, frozen or not, and ranks may differ in that.
    They do not differ in freezing (requires_grad), a decision of the program: what is frozen and had no gradient on any
    rank when it was asked for is left out, so that frozen weights beside adapters cost nothing.
    """
    if runtime.ranks.alone:  # coordinates never take part
        return [mat for mat in mats if mat.family == "basis" and mat.grads is not None and mat.is_due()]
    suspects = []
    for mat in mats:
        known = runtime.agreed.get(mat.matrix.index)
        if known is not None and known.asleep and mat.frozen:
            suspect = False
        else:
            suspect = known is None or mat.is_due(known.updates + known.calls, known.refreshed_at)
        if suspect and _takes_part(runtime, mat):
            suspects.append(mat)
        elif known is not None:
            known.calls += 1
    return suspects


def _agree(runtime: Runtime, suspects: Sequence[LocalMatrix], regular: Sequence[LocalParameter]) -> dict[int, Report]:
    """One small all-reduce: counts, presence and health of the gradients, equality of settings and of replicas."""
    settings = _settings(suspects, regular)
    mark = 0 if runtime.ranks.alone else zlib.crc32(repr(settings).encode())
    values = [mark, -mark]
    for mat, (finite, nonzero) in zip(suspects, _gradient_health(suspects), strict=True):
        updates = mat.state.counter("updates")
        presence = _GRADIENT if mat.grads is not None else _FROZEN if mat.frozen else _TRAINED
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
    for position, mat in enumerate(suspects):
        most, negative_least, presence, bad, moving = agreed[5 * position : 5 * position + 5]
        if most != -negative_least:
            _notice(
                runtime, f"{mat.matrix.name}: ranks counted {-negative_least} to {most} updates; all go on with {most}"
            )
            mat.state.set_counter("updates", most)
        if bad and mat.is_due():
            _notice(
                runtime,
                f"{mat.matrix.name}: its gradient has NaN or infinite entries at a projector refresh. All ranks leave "
                "the matrix alone on this step and try again on the next.",
            )
        reports[mat.matrix.index] = Report(most, presence == _GRADIENT, presence != _FROZEN, not bad, not moving)
    resynchronise(runtime, mismatched(runtime, compared, agreed[5 * len(suspects) :]))
    return reports


Settings = list[tuple[str, FrugalConfig, float]]


def _settings(suspects: Sequence[LocalMatrix], regular: Sequence[LocalParameter]) -> Settings:
    """By name what all ranks step with: replicas that are stepped otherwise on one of them drift apart."""
    settings = [(mat.matrix.name, mat.config, mat.decay) for mat in suspects]
    return settings + [(one.name, one.config, one.decay) for one in regular]


def _difference(runtime: Runtime, settings: Settings) -> str:
    """The first hyperparameter that is another one on some rank. Collective."""
    own = [(name, asdict(config) | {"weight_decay": decay}) for name, config, decay in settings]
    everyone = gather_objects(runtime.ranks, own)
    for rank, theirs in enumerate(everyone):
        for (name, first), (_, options) in zip(everyone[0], theirs, strict=False):
            for key, value in first.items():
                if options[key] != value:
                    return f"{key} of {name} is {value!r} on rank 0, {options[key]!r} on rank {rank}"
    return "learning rate, density, ..."


def _gradient_health(mats: Sequence[LocalMatrix]) -> list[tuple[bool, bool]]:
    """(finite, nonzero) of every matrix' local gradient, with one transfer to the host."""
    flags: list[Tensor] = []
    spans: list[tuple[int, int]] = []
    for mat in mats:
        checked = mat.grads if mat.family == "basis" and mat.grads is not None else []
        # On one device: a process may have a model on several GPUs.
        ends = (torch.stack(torch.aminmax(grad)).to(mats[0].device) for grad in checked if grad.numel())
        checks = [torch.stack([torch.isfinite(both).all(), (both != 0).any()]) for both in ends]
        spans.append((len(flags), len(flags) + len(checks)))
        flags += checks
    host = torch.stack(flags).cpu() if flags else torch.empty(0, 2, dtype=torch.bool, device="cpu")
    return [(bool(host[a:b, 0].all()), bool(host[a:b, 1].any())) for a, b in spans]


def _present(runtime: Runtime, mat: LocalMatrix, reports: dict[int, Report]) -> bool:
    """Whether any rank has a gradient for coordinates that are due."""
    report = reports.get(mat.matrix.index)
    if report is not None:
        return report.present
    return mat.grads is not None and not _takes_part(runtime, mat)  # else frozen, and nobody had one when asked


def _usable(mat: LocalMatrix, reports: dict[int, Report]) -> bool:
    report = reports[mat.matrix.index]
    return not mat.empty and report.present and report.finite and not report.zero


def _can_step(mat: LocalMatrix, reports: dict[int, Report]) -> bool:
    """Skip a matrix whose gradient is not finite at its refresh, and one that never had a projector."""
    if not reports:
        return mat.state.counts["refreshes"] > 0 or mat.matrix.empty
    if mat.empty:
        return True
    report = reports.get(mat.matrix.index)
    spoilt = report is not None and not report.finite and mat.is_due()  # asked for too early: not due, not skipped
    return mat.state.counter("refreshes") > 0 and not spoilt


def _notice(runtime: Runtime, text: str) -> None:
    if runtime.ranks.rank == 0:
        notice(text)
