"""The step inside backward: whose gradients have come, who was stepped, and what step() has left to do.

Parameters are known by their positions. Nothing here looks at a gradient: ``update`` is the ordinary step, of some.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch
from torch import Tensor

TWICE = (
    "{name} had a second gradient before optimizer.step(), but the first one was stepped with and is gone "
    "(frugal_dist.step_in_backward). Call optimizer.step() after each backward pass, in which each parameter (with "
    "FSDP2 each unit) gets its gradient once. Accumulation over micro-batches needs the whole gradient: leave "
    "step_in_backward out, or with FSDP2 reduce gradients in the last micro-batch only "
    "(model.set_requires_gradient_sync(False) before)."
)
HALF = (
    "Half of a step is taken: backward() has stepped parameters (frugal_dist.step_in_backward), and optimizer.step() "
    "has not ended the step. Call optimizer.step() before anything is saved or loaded."
)


@dataclass
class Release:
    """Steps units of parameters as soon as their gradients are there, and drops those gradients.

    ``units``: positions that are stepped together, in calls of their own; every position is in one at most. What is in
    none, and what had no gradient, is left for ``close``. ``update(positions)``: False if nothing has ever moved and
    all these gradients are zero; then they wait for more. None means all positions. ``check`` raises ValueError where
    something else needs the gradients; it is asked at the first gradient and at the first ``close``. ``alone``: one
    process, no collectives. ``stream``: on a GPU, where backward computes and ``close`` steps.

    Which units are stepped, and when, follows from the order of arrival: that has to be the same on all ranks.
    """

    params: list[Tensor]
    names: list[str]
    units: Sequence[tuple[int, ...]]
    alone: bool
    update: Callable[[Sequence[int] | None], bool]
    check: Callable[[], None]
    handles: dict[int, Any] = field(default_factory=dict)
    unchecked: set[str] = field(default_factory=lambda: {"arrive", "close"})
    arrived: set[int] = field(default_factory=set)
    stepped: set[int] = field(default_factory=set)
    held: list[int] = field(default_factory=list)
    current: int | None = None
    stream: Any = None
    _lock: Any = field(default_factory=RLock)  # autograd has a thread for each device

    def __post_init__(self) -> None:
        self._unit = {i: number for number, unit in enumerate(self.units) for i in unit}
        self.watch()

    def watch(self) -> None:
        """Hear of the gradients of whoever is trained now. Hooks do not keep this alive: the optimizer does."""
        me, self.stream = weakref.ref(self), _current_stream()
        for i in self._unit.keys() - self.handles.keys():
            if self.params[i].requires_grad:
                self.handles[i] = self.params[i].register_post_accumulate_grad_hook(_hook(me, i))

    def _check(self, when: str) -> None:
        if when in self.unchecked:
            self.unchecked.remove(when)
            self.check()

    @property
    def half_done(self) -> bool:
        """Whether a step has begun that ``close`` has not ended."""
        return bool(self.arrived)

    def arrive(self, i: int) -> None:
        """The gradient of a parameter is complete. Steps its unit if all of its members that are trained have theirs,
        and the unit before if that still waits: its other members were not used.

        Raises ValueError for a second gradient.
        """
        with self._lock:
            self._check("arrive")
            if i in self.arrived or i in self.stepped:
                raise ValueError(TWICE.format(name=self.names[i]))
            unit = self._unit[i]
            if self.current not in (None, unit):
                self._step_current()
            self.current = unit
            self.arrived.add(i)
            if all(j in self.arrived or not self.params[j].requires_grad for j in self.units[unit]):
                self._step_current()

    def close(self) -> None:
        """Step what is left; an ordinary step if nothing was stepped. Afterwards a new step begins."""
        with self._lock:
            try:
                self._check("close")
                self._step_current()
                if not self.stepped:
                    self.update(None)
                else:
                    for call in self._left():
                        self.update(call)
            finally:
                self.arrived.clear()
                self.stepped.clear()
                self.held, self.current = [], None
                self.watch()

    def _left(self) -> list[list[int]]:
        """What was not stepped. On several ranks unit by unit, as their calls always are: what is known of a call, such
        as its buckets, is kept by its members.
        """
        if self.alone:
            left = [i for i in range(len(self.params)) if i not in self.stepped]
            return [left] if left else []
        units = [list(unit) for unit in self.units if not self.stepped.issuperset(unit)]
        rest = [i for i in range(len(self.params)) if i not in self._unit]
        return [*units, rest] if rest else units

    def catch_up(self) -> None:
        """Let backward wait for what was queued here, after tensors of the state were replaced.

        FSDP2 calls hooks on the stream of its reduce-scatter, which follows backward's. Nobody follows that one before
        the end of backward, so memory of ``stream`` that is freed here would be used again while kernels still read it.
        """
        here = _current_stream()
        if here is not None and self.stream is not None and here != self.stream:
            self.stream.wait_stream(here)

    def _step_current(self) -> None:
        if self.current is None:
            return
        about = [*self.held, *self.units[self.current]]
        self.current = None
        if not self.update(about):
            self.held = about
            return
        self.held = []
        self.stepped.update(about)
        for i in about:
            self.params[i].grad = None

    def remove(self) -> None:
        """End it: steps are ordinary ones from now on. ValueError between backward() and step()."""
        if self.half_done:
            raise ValueError(HALF)
        self._unit = {}
        for handle in self.handles.values():
            handle.remove()
        self.handles.clear()


def _current_stream() -> Any:
    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None


def _hook(release: weakref.ref[Release], i: int) -> Callable[[Tensor], None]:
    def arrived(_: Tensor) -> None:
        there = release()
        if there is not None:
            there.arrive(i)

    return arrived
