"""The state of one matrix on this rank: a window on ``optimizer.state``. Tensors only, so weights-only loads work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from operator import is_
from typing import Any

import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig
from frugal_dist.projection.basis import Basis
from frugal_dist.update.eightbit import CODE
from frugal_dist.update.moment_storage import FORMS, SCALE, Extent, Shape, cut
from frugal_dist.update.remainder import REMAINDER
from frugal_dist.update.rules import STATE_FULL, every_key, every_moment

COUNTERS = ("step", "updates", "refreshes", "refreshed_at", "size")
"""step: Adam's t since the last reset. updates: k, never reset. refreshes: so far. refreshed_at: k then, -1: never.
size: r, or the number of selected columns, rows, entries or blocks, at the last refresh."""

BASES = ("basis", "basis_left", "basis_right")
FREE: dict[str, tuple[Callable[[int, int], Shape], float]] = {
    "free_norm": (lambda rows, cols: (1,), 0.0),
    "free_rows": (lambda rows, cols: (rows,), 0.0),
    "free_cols": (lambda rows, cols: (cols,), 1.0),
}
"""What state-free rules keep, where their matrix is whole: its shape, and what it begins with."""
KEPT = (*BASES, *FREE)
BESIDE_MOMENTS = (*KEPT, REMAINDER)
"""All that is no counter and no moment."""


class Counters:
    """All counters of a rank in one tensor, which the states show parts of: a step counts in one call of torch, and one
    look tells whether somebody else wrote to any of them.
    """

    def __init__(self, states: int) -> None:
        with torch.inference_mode(False):  # what is made in it has no version, and can be changed in it only
            self.values = torch.zeros(len(COUNTERS), states, dtype=torch.int64, device="cpu")
        self.written = self.values._version
        """How often we wrote ourselves, as torch counts."""
        self.readings = 0
        """How often others did, which makes what was read before worthless."""

    def look(self) -> None:
        """Notice what others wrote."""
        if self.values._version != self.written:
            self.written = self.values._version
            self.readings += 1

    def advance(self, states: Sequence[MatrixState], number: int) -> None:
        """Write the first ``number`` counters, which have become one more in ``counts``, of states that are known."""
        if states:
            rows = torch.tensor([state.row for state in states], device="cpu")
            self.values[:number].index_add_(1, rows, self.values.new_ones(number, len(states)))
            self.written += 1


@dataclass
class MatrixState:
    """``store`` is the state of the tensor that carries it; ``prefix`` tells matrices apart that share one. ``row`` is
    its place among all counters.

    ``counts``: what the counters say, as Python numbers; true between ``remember`` and the end of the call. Steps read
    them, since a look at a tensor costs as much as a small matrix does.
    """

    store: MutableMapping[str, Tensor]
    prefix: str = ""
    counters: Counters = field(default_factory=lambda: Counters(1))
    row: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    bare: bool = True
    """Counters and nothing else: of what is frozen."""
    _keys: list[str] = field(default_factory=list)
    _seen: list[Tensor] = field(default_factory=list)
    _others: list[Tensor] = field(default_factory=list)
    _entries: int = 0
    _reading: int = -1
    _dtype: torch.dtype | None = None

    def remember(self, dtype: torch.dtype, names: Sequence[str] = COUNTERS) -> None:
        """Read the counters, and note what there is, so that ``is_known`` can tell whether any of it was changed."""
        for name, own in zip(COUNTERS, self.counters.values[:, self.row].unbind(), strict=True):
            if name in names:
                self.counts[name] = int(self.store[self.prefix + name])
                own.fill_(self.counts[name])
                self.counters.written += 1
                self.store[self.prefix + name] = own
        keys = [self.prefix + name for name in (*names, *every_key(), *BESIDE_MOMENTS)]
        self._keys = [key for key in keys if key in self.store]
        self._seen = [self.store[key] for key in self._keys]
        self._others = self._seen[len(names) :]
        self.bare = not self._others
        self._entries, self._dtype, self._reading = len(self.store), dtype, self.counters.readings

    def forget(self) -> None:
        """Whatever ``remember`` saw: a step was cut off between its counts and its counters."""
        self._dtype = None

    def is_known(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether all is as ``remember`` saw it: the same tensors, where the weights are, no counter written by others.

        Loading, a change of device or dtype, and engines that replace tensors all show.
        """
        store, counters = self.store, self.counters
        if self._dtype is not dtype or self._entries != len(store):
            return False
        if self._reading != counters.readings or not all(map(is_, map(store.get, self._keys), self._seen)):
            return False
        for value in self._others:  # noqa: SIM110 (a generator would cost as much as all the rest)
            if value.device != device:
                return False
        return True

    def ensure_counters(self) -> None:
        """Create what is missing, on the CPU."""
        for key in (self.prefix + name for name in COUNTERS):
            if key not in self.store:
                self.store[key] = torch.tensor(-1 if key.endswith("refreshed_at") else 0, device="cpu")

    def follow(self, device: torch.device) -> None:
        """Take all to where the weights are now. People keep state on the CPU between two phases."""
        for key in (self.prefix + name for name in (*every_key(), *BESIDE_MOMENTS)):
            value = self.store.get(key)
            if value is not None and value.device != device:
                self.store[key] = value.to(device)

    def counter(self, name: str) -> int:
        value: int = self.store[self.prefix + name].item()  # type: ignore[assignment]  # integers, twice as fast as int()
        return value

    def set_counter(self, name: str, value: int) -> None:
        counter = self.store[self.prefix + name]
        counter.fill_(value)
        self.counts[name] = value
        if counter._base is self.counters.values:
            self.counters.written += 1

    def count_refresh(self, size: int) -> None:
        """A refresh at the present update, after which ``size`` is selected."""
        self.set_counter("refreshes", self.counter("refreshes") + 1)
        self.set_counter("refreshed_at", self.counter("updates"))
        self.set_counter("size", size)

    def get(self, name: str) -> Tensor | None:
        return self.store.get(self.prefix + name)

    def put(self, name: str, value: Tensor | None) -> None:
        if value is None:
            self.store.pop(self.prefix + name, None)
        else:
            self.store[self.prefix + name] = value

    def ensure_moments(
        self, config: FrugalConfig, extents: Sequence[Extent], dtype: torch.dtype, device: object
    ) -> None:
        """Zero moments where there are none of the right size; the same tensors whatever the number of pieces."""
        wanted: dict[str, tuple[Shape, torch.dtype]] = {}
        for name in STATE_FULL[config.state_full].names:
            wanted |= config.form.tensors(name, extents, dtype)
        for key in every_key():
            if key not in wanted:
                self.put(key, None)
                continue
            shape, kind = wanted[key]
            present = self.get(key)
            if present is None or present.numel() != prod(shape) or present.dtype != kind:
                self.put(key, torch.zeros(shape, dtype=kind, device=torch.device(str(device))))
            elif present.shape != shape:  # as many, selected otherwise: saved and loaded they have this shape
                self.put(key, present.reshape(shape))

    def moments(self, config: FrugalConfig, extents: Sequence[Extent]) -> list[tuple[Any, ...]]:
        """For each piece its tuple of moments, as their form shows them."""
        form = FORMS[config.moments]
        return form.views(STATE_FULL[config.state_full].moments, extents, self.store, self.prefix)

    def numbers(self, config: FrugalConfig, extents: Sequence[Extent], only: str = "") -> dict[str, list[Tensor]]:
        """Each moment's values by piece, or one's ``only``, to be read only: they may be what is kept."""
        names, pieces = STATE_FULL[config.state_full].names, self.moments(config, extents)
        return {
            name: [config.form.numbers(own[k], extent.shape) for own, extent in zip(pieces, extents, strict=True)]
            for k, name in enumerate(names)
            if only in ("", name)
        }

    def write(self, config: FrugalConfig, extents: Sequence[Extent], values: Mapping[str, Sequence[Tensor]]) -> None:
        """Overwrite moments with values by piece."""
        names = STATE_FULL[config.state_full].names
        for number, own in enumerate(self.moments(config, extents)):
            for name, view in zip(names, own, strict=True):
                if name in values:
                    config.form.write_(view, values[name][number])

    def flat(self, config: FrugalConfig, extents: Sequence[Extent], only: str = "") -> dict[str, Tensor]:
        """Each moment's values, one piece behind the other, or one's ``only``, to be read only."""
        store, prefix = self.store, self.prefix
        return {
            moment.name: config.form.flat(moment, extents, lambda key: store[prefix + key])
            for moment in STATE_FULL[config.state_full].moments
            if only in ("", moment.name)
        }

    def kept(self) -> dict[str, Tensor]:
        """All that is kept of moments, by key."""
        return {key: value for key in every_key() if (value := self.get(key)) is not None}

    @property
    def coded(self) -> bool:
        """Whether moments are kept as codes."""
        return any(self.get(name + SCALE) is not None for name in every_moment())

    def kept_as(self, config: FrugalConfig) -> FrugalConfig:
        """``config`` with the form in which the moments are kept; loaded ones may be in another one."""
        coded = self.coded
        if coded is config.form.blocky:
            return config
        return replace(config, moments=next(name for name, form in FORMS.items() if form.blocky is coded))

    def repack(self, config: FrugalConfig, extents: Sequence[Extent], dtype: torch.dtype) -> None:
        """Moments in the form that ``config`` has."""
        present = self.kept_as(config)
        if present is config or not self.has_moments():
            return
        values = self.numbers(present, extents)
        for name in values:
            self.put(name, None)
        device = next(part.device for pieces in values.values() for part in pieces) if extents else torch.device("cpu")
        self.ensure_moments(config, extents, dtype, device)
        self.write(config, extents, values)

    def ensure_remainder(self, shapes: Sequence[Shape], device: torch.device) -> None:
        """A remainder of zeros where there is none: bf16 weights are exact themselves."""
        if self.get(REMAINDER) is None:
            shape = shapes[0] if len(shapes) == 1 else (sum(map(prod, shapes)),)
            self.put(REMAINDER, torch.zeros(shape, dtype=torch.int16, device=device))

    def pieces(self, name: str, shapes: Sequence[Shape]) -> list[Tensor]:
        """Views of what is kept under ``name``, one for each shape."""
        return cut(self.store[self.prefix + name], [Extent(shape) for shape in shapes])

    def convert(self, dtype: torch.dtype, numbered: bool = False) -> None:
        """Moments and bases as this run computes with them. Bases kept in bf16 stay so until their refresh.
        ``numbered``: they are numbers of columns.
        """
        for name in (*every_key(), *FREE):
            moment = self.get(name)
            if moment is not None:
                self.put(name, moment.to(CODE if self.get(name + SCALE) is not None else dtype))
        for name in BASES:
            basis = self.get(name)
            if basis is not None and (numbered or basis.dtype != torch.bfloat16):
                self.put(name, basis.to(torch.int32 if numbered else dtype))

    def drop(self) -> None:
        """Forget everything but the counts, and the remainders, which are the weights'."""
        for name in (*every_key(), *KEPT):
            self.put(name, None)

    def has_moments(self) -> bool:
        """Whether there are moments, be they empty: not so before the first step, and while a parameter is frozen."""
        return self.moments_dtype() is not None

    def moments_dtype(self) -> torch.dtype | None:
        """Of the moments as numbers, None: there are none."""
        for name in every_moment():
            moment = self.get(name)
            if moment is not None:
                scales = self.get(name + SCALE)
                return moment.dtype if scales is None else scales.dtype
        return None

    def reset(self) -> None:
        """Zero the moments and Adam's t."""
        for name in every_key():
            moment = self.get(name)
            if moment is not None:
                moment.zero_()
        self.set_counter("step", 0)

    def basis(self, side: str) -> Basis | None:
        """The basis, or None before the first refresh and on ranks that do not use it."""
        store, prefix = self.store, self.prefix
        if store[prefix + "refreshes"].item() == 0:
            return None
        if side == "full":
            left, right = store.get(prefix + "basis_left"), store.get(prefix + "basis_right")
            return Basis(left, right) if left is not None else None
        only = store.get(prefix + "basis")
        return None if only is None else Basis(only, None) if side == "left" else Basis(None, only)

    def ensure_basis(self, side: str, shapes: Mapping[str, Shape], dtype: torch.dtype, device: torch.device) -> None:
        """Zero bases, or numbers of columns, of these shapes by part where there are none."""
        for part, size in shapes.items():
            key = "basis" if side != "full" else f"basis_{part}"
            present = self.get(key)
            if present is None or tuple(present.shape) != size:
                self.put(key, torch.zeros(size, dtype=dtype, device=device))

    def ensure_free(
        self, names: Sequence[str], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """What a state-free rule keeps of a rows x cols matrix, where it is not there."""
        for name in names:
            size, value = FREE[name]
            if self.get(name) is None:
                self.put(name, torch.full(size(*shape), value, dtype=dtype, device=device))

    def set_basis(self, side: str, basis: Basis) -> None:
        if side == "full":
            self.put("basis_left", basis.left)
            self.put("basis_right", basis.right)
        else:
            self.put("basis", basis.parts[0])


def bring_counters_home(states: Sequence[MatrixState]) -> None:
    """Counters lie on the CPU: on a GPU every look at one would make the host wait. Who moves all state there and back
    takes them along; they return in one transfer. None is left a part of others: who swaps states swaps rows.
    """
    entries = [(state, name, state.get(name)) for state in states for name in COUNTERS]
    counters = [(state, name, counter) for state, name, counter in entries if counter is not None]
    astray = [entry for entry in counters if not entry[2].is_cpu]
    if astray:
        values = torch.stack([counter.to(astray[0][2].device) for _, _, counter in astray]).cpu()
        counters = [entry for entry in counters if entry[2].is_cpu]
        counters += [(state, name, value) for (state, name, _), value in zip(astray, values, strict=True)]
    for state, name, counter in counters:
        state.put(name, counter.clone())
