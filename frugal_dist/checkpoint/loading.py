"""Loading: compare, then plan everything, and only then change anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal_dist import engines
from frugal_dist.checkpoint.compare import Anew, compare, parameters_here, summary
from frugal_dist.checkpoint.errors import DamagedError, MismatchError, together
from frugal_dist.checkpoint.extra import check_rng_state, fitted, reseed, set_rng_state
from frugal_dist.checkpoint.index import INDEX
from frugal_dist.checkpoint.parts import (
    LOW,
    WEIGHT,
    Chunk,
    leftovers,
    regular_entries,
    regular_state_chunks,
    remainder_chunks,
    state_chunks,
    weight_chunks,
)
from frugal_dist.checkpoint.reader import Reader
from frugal_dist.checkpoint.savers import names_together
from frugal_dist.config import HYPERPARAMETERS, FrugalConfig, python_value, saved_group
from frugal_dist.notices import notice
from frugal_dist.optimizer import Frugal
from frugal_dist.parameters.groups import moved_by_schedules
from frugal_dist.projection.numerics import compute_dtype
from frugal_dist.sharding.collectives import Ranks, gather_objects
from frugal_dist.step.inputs import StepInputs, create_moments, ensure_state
from frugal_dist.step.runtime import (
    LocalMatrix,
    LocalParameter,
    Runtime,
    basis_route,
    extents_of,
    regular_extents,
    remainders_of,
)
from frugal_dist.step.state import COUNTERS, KEPT, MatrixState
from frugal_dist.update.remainder import joined, split_
from frugal_dist.update.rules import every_key

META = torch.device("meta")


def read_checkpoint(
    path: Path, model_or_engine: Any, frugal: Frugal, on_mismatch: str, verify: bool, rng: bool, ranks: Ranks
) -> dict[str, Any]:
    """Load ``path`` into what ``ranks`` have, see ``loaders``, and return this rank's extra. Collective.

    Raises a CheckpointError on all ranks alike.

    Nothing is changed until every rank has found everything it needs.
    """
    runtime, now = frugal.everything()
    reader = _open(ranks, path, verify)
    here = together(ranks, lambda: parameters_here(runtime, model_or_engine))
    known = names_together(ranks, runtime.ranks, here)
    fresh = together(ranks, lambda: compare(runtime, now, reader, here, known, on_mismatch == "refresh"))
    record, own = together(ranks, lambda: _record(reader, ranks.rank))
    counts = together(ranks, lambda: _fitted_counts(record["engine"], model_or_engine))
    restoring = Restoring(runtime, now, reader, model_or_engine, fresh)
    together(ranks, restoring.check)
    together(ranks, restoring.carry_out)
    frugal.loaded()
    engines.after_loading(model_or_engine, counts)
    news = _restore_groups(runtime, reader)
    if any(fresh.values()):
        news.append(f"These start with fresh state: {summary(fresh)}.")
    if news and runtime.ranks.rank == 0:
        notice(f"{reader.folder} {' '.join(news)}")
    if rng:
        set_rng_state(record["rng"]) if own else reseed(record["rng"], ranks.rank)
    extra: dict[str, Any] = record["extra"]
    return extra


def _open(ranks: Ranks, path: Path, verify: bool) -> Reader:
    reader = together(ranks, lambda: Reader(path))
    seen = gather_objects(ranks, (reader.index.identity, str(path)))
    for rank, (identity, _) in enumerate(seen):
        if identity != seen[0][0]:
            raise DamagedError(
                f"rank 0 and rank {rank} see different checkpoints at {seen[0][1]}. All ranks must share the folder, "
                "and no other job may save to it meanwhile."
            )
    # Together the ranks look at every file once.
    together(ranks, lambda: reader.check_files(ranks.rank, ranks.size, contents=verify))
    return reader


def _record(reader: Reader, rank: int) -> tuple[dict[str, Any], bool]:
    """What the rank wrote beside its tensors, see ``Reader.record``, with generators that can be set."""
    record, own = reader.record(rank)
    try:
        check_rng_state(record["rng"])
    except Exception as error:  # generators raise many kinds
        raise DamagedError(f"{reader.extra_path(rank)} is damaged: its generators cannot be set ({error}).") from error
    return record, own


def _fitted_counts(counts: dict[str, Any], engine: Any) -> dict[str, Any]:
    """An engine's own counts, its schedule fitted to the groups there are now."""
    scheduler, state = getattr(engine, "lr_scheduler", None), counts.get("schedule")
    return {**counts, "schedule": fitted(state, scheduler.state_dict())} if scheduler is not None and state else counts


@dataclass
class Restoring:
    """One load. ``fresh``: matrices and regular parameters whose state starts anew."""

    runtime: Runtime
    now: StepInputs
    reader: Reader
    model_or_engine: Any
    fresh: Anew

    def check(self) -> None:
        """Whether everything this rank needs can be read; changes nothing."""
        for chunk in self._kept_in_place([self._with_room(one, META) for one in self.now.regular]):
            self.reader.find(chunk.name, chunk.shape, chunk.area)
            if chunk.repeats:
                self._check_room(chunk)
        for chunk in remainder_chunks(self.runtime, self.now):
            if self.reader.shape(chunk.name) is not None:
                self.reader.find(chunk.name, chunk.shape, chunk.area)
        for mat in self.now.mats:
            if not self._starts_anew(mat.matrix.name):
                for chunk in self._state_then(mat):
                    self.reader.find(chunk.name, chunk.shape, chunk.area)

    def _state_then(self, mat: LocalMatrix) -> list[Chunk]:
        """What there must be of a matrix, by its counts. DamagedError if these are not of this matrix."""
        try:
            return list(state_chunks(self.runtime, self._rebuilt(mat, META)))
        except (ValueError, RuntimeError, OverflowError) as error:
            raise DamagedError(
                f"{self.reader.folder / INDEX} is damaged: the counts of {mat.matrix.name} are impossible ({error})."
            ) from error

    def _check_room(self, chunk: Chunk) -> None:
        values = torch.empty_like(chunk.data)
        self.reader.fill(chunk.name, chunk.shape, chunk.area, values)
        if not chunk.has_room_for(values):
            raise MismatchError(
                f"{self.reader.folder}: {chunk.name} was saved with different values where it is an expanded view now, "
                "whose elements share memory. Give it memory of its own: .contiguous()."
            )

    def carry_out(self) -> None:
        """Overwrite weights, state and counts."""
        for i, one in regular_entries(self.runtime, self.now):
            if self._keeps_moments(one):
                create_moments(one)
                if one.state.coded:
                    self._fill_coded(i, one)
                self._set_counter(one)
            else:
                _reset_regular(one)
        for mat in self.now.mats:
            fresh = self._starts_anew(mat.matrix.name)
            rebuilt = self._renewed(mat) if fresh else self._rebuilt(mat, mat.device)
            if not fresh:
                self._fill(state_chunks(self.runtime, rebuilt))
                if not mat.empty and rebuilt.state.counter("refreshes"):
                    rebuilt.state.repack(mat.config, extents_of(self.runtime, rebuilt), mat.dtype)
            _replace_state(mat, rebuilt.state)
        self._fill(chunk for chunk in self._kept_in_place(self.now.regular) if chunk.later is None)
        self._fill_exactly()

    def _fill_exactly(self) -> None:
        """Weights of which all 32 bits are known, here or in the checkpoint: as masters, or as bf16 and a remainder."""
        everything: list[LocalMatrix | LocalParameter] = [*self.now.mats, *self.now.regular]
        for one in everything:
            if one.state.has_moments():
                remainders_of(one)
        rests = {(chunk.name, chunk.area): chunk.data for chunk in remainder_chunks(self.runtime, self.now)}
        for chunk in weight_chunks(self.runtime, self.now):
            name = LOW + chunk.name.removeprefix(WEIGHT)
            rest, saved = rests.get((name, chunk.area)), self.reader.shape(name) is not None
            if rest is None and (not saved or chunk.data.dtype.itemsize < torch.float32.itemsize):
                continue
            exact = torch.empty(chunk.data.shape, dtype=torch.float32, device="cpu")
            self.reader.fill(chunk.name, chunk.shape, chunk.area, exact)
            low = torch.zeros(chunk.data.shape, dtype=torch.int16, device="cpu")
            if saved:
                self.reader.fill(name, chunk.shape, chunk.area, low)
                exact = joined(exact.bfloat16(), low)
            if rest is None:
                chunk.data.copy_(exact)
            else:
                near = torch.empty(chunk.data.shape, dtype=torch.bfloat16, device="cpu")
                split_(near, low, exact)
                chunk.data.copy_(near)
                rest.copy_(low)
            chunk.settle()

    def _kept_in_place(self, regular: list[LocalParameter]) -> Iterator[Chunk]:
        """Weights, everything the optimizer does not hold, and the moments of regular parameters."""
        yield from weight_chunks(self.runtime, self.now)
        for other in leftovers(self.runtime, self.model_or_engine):
            yield from other.chunks
        kept = {one.name for one in regular if self._keeps_moments(one)}
        for name, chunk in regular_state_chunks(self.runtime, replace(self.now, regular=regular)):
            if name in kept:
                yield chunk

    def _fill(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self.reader.fill(chunk.name, chunk.shape, chunk.area, chunk.data)
            chunk.settle()

    def _fill_coded(self, i: int, one: LocalParameter) -> None:
        """The moments of regular parameter ``i``, by way of numbers."""
        scratch = replace(one, state=MatrixState({}, one.state.prefix), config=_in_full(one.config))
        create_moments(scratch)
        alone = replace(self.now, key=(i,), regular=[scratch])
        self._fill(chunk for _, chunk in regular_state_chunks(self.runtime, alone))
        scratch.state.repack(one.config, regular_extents(one), compute_dtype(one.weight.dtype))
        one.state.store.update(scratch.state.store)

    def _starts_anew(self, name: str) -> bool:
        return name in self.fresh

    def _keeps_moments(self, one: LocalParameter) -> bool:
        """Before the first step moments are zeros, or not there: then the parameter was frozen."""
        return not self._starts_anew(one.name) and self._saved_step(one) > 0

    def _with_room(self, one: LocalParameter, device: torch.device) -> LocalParameter:
        """As it is, or with moments of its own on ``device`` if it has none (it is frozen), but some were saved."""
        if one.state.has_moments() or not self._keeps_moments(one):
            return one
        scratch = replace(one, state=MatrixState({}, one.state.prefix))
        create_moments(scratch, device)
        return scratch

    def _saved_step(self, one: LocalParameter) -> int:
        return int(self.reader.index.regular[one.name]["clocks"]["step"])

    def _set_counter(self, one: LocalParameter) -> None:
        one.state.set_counter("step", self._saved_step(one))

    def _rebuilt(self, mat: LocalMatrix, device: torch.device) -> LocalMatrix:
        """The matrix with a state of its own that has room for what was saved, in full; the live one is untouched."""
        counters = self.reader.index.matrices[mat.matrix.name]["clocks"]
        scratch = replace(mat, state=MatrixState({}, mat.state.prefix))
        if mat.empty or int(counters["refreshes"]) == 0:
            return self._renewed(mat)
        _set_counters(scratch.state, counters)
        scratch.state.ensure_moments(_in_full(mat.config), extents_of(self.runtime, scratch), mat.dtype, device)
        if mat.family != "basis":
            return scratch
        plan, r = basis_route(self.runtime, mat), int(counters["size"])
        if plan.tiles:
            scratch.state.ensure_free(mat.config.keeps, (mat.matrix.rows, mat.matrix.cols), mat.dtype, device)
        if plan.tiles and mat.kept_shapes(r):
            dtype = mat.basis_dtype if device == META else self._basis_dtype(mat)
            scratch.state.ensure_basis(mat.side, mat.kept_shapes(r), dtype, device)
        return scratch

    def _basis_dtype(self, mat: LocalMatrix) -> torch.dtype:
        """As it was kept: another basis_dtype counts from the next refresh, as it does in a run that goes on."""
        key = "basis_left" if mat.side == "full" else "basis"
        kept = self.reader.dtype(f"state/{mat.matrix.name}/{key}")
        return kept if kept in (torch.bfloat16, torch.int32) else mat.dtype

    def _renewed(self, mat: LocalMatrix) -> LocalMatrix:
        """The matrix with state as before its first refresh, which is due now; its updates stay counted."""
        scratch = replace(mat, state=MatrixState({}, mat.state.prefix))
        ensure_state(self.runtime, replace(self.now, mats=[scratch], regular=[]))
        saved = self.reader.index.matrices.get(mat.matrix.name)
        if saved is not None:
            scratch.state.set_counter("updates", int(saved["clocks"]["updates"]))
        return scratch


def _set_counters(state: MatrixState, counters: Mapping[str, Any]) -> None:
    state.ensure_counters()
    for name in COUNTERS:
        state.set_counter(name, int(counters[name]))


def _replace_state(mat: LocalMatrix, new: MatrixState) -> None:
    """``new`` becomes the live state; whatever else the matrix had goes."""
    live = mat.state
    for key in [key for key in live.store if key in _keys(live)]:
        del live.store[key]
    live.store.update(new.store)


def _keys(state: MatrixState) -> set[str]:
    return {state.prefix + name for name in (*COUNTERS, *every_key(), *KEPT)}


def _in_full(config: FrugalConfig) -> FrugalConfig:
    """What is saved are numbers, whatever form they were kept in."""
    return replace(config, moments="full")


def _reset_regular(one: LocalParameter) -> None:
    for kept in one.state.kept().values():
        kept.zero_()
    one.state.set_counter("step", 0)


# --- hyperparameters that move ----------------------------------------------------------------------


def _restore_groups(runtime: Runtime, reader: Reader) -> list[str]:
    """Learning rates, and whatever schedulers keep in the groups. Other hyperparameters are the program's; returns what
    to say about those that changed.
    """
    saved = {name: saved_group(group["options"], {}) for group in reader.index.groups for name in group["members"]}
    groups: dict[int, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for i, original in enumerate(runtime.originals):
        options = runtime.storage.options(i)
        known = groups.setdefault(id(options), (options, []))[1]
        if original.name in saved and saved[original.name] not in known:
            known.append(saved[original.name])
    changes: set[str] = set()
    for options, then in groups.values():
        for key in {key for each in then for key in each}:
            values = [each[key] for each in then if key in each]
            if any(value != values[0] for value in values):
                continue  # one group now, several then: the program's value holds
            changes |= _restore_option(options, key, values[0], moved_by_schedules(then[0]))
    listed = "; ".join(sorted(changes))
    return [f"was saved with other hyperparameters: {listed}. The new ones hold."] if changes else []


def _restore_option(options: dict[str, Any], key: str, value: Any, moved: Sequence[str]) -> set[str]:
    value, present = python_value(value), options.get(key)
    if python_value(present) == value:
        return set()
    if key not in HYPERPARAMETERS or key in moved:
        if isinstance(present, Tensor):
            present.fill_(value)
        else:
            options[key] = value
        return set()
    return {f"{key} {value!r} -> {python_value(present)!r}"}
