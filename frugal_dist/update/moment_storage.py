"""How moments are kept between steps: as numbers, or as 8-bit codes with scales. The state, steps, checkpoints and the
planner ask the form; none of them knows which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from frugal_dist.update.definition import Moment, Tensors
from frugal_dist.update.eightbit import BLOCK, CODE, Packed, blocks_of

SCALE = "_scale"
"""Behind the name of a moment: the scales of its codes."""
SLICE, CUDA_SLICE = 1 << 20, 1 << 22
"""Entries that are numbers at the same time during a step, where a rule takes each entry by itself: temporaries, 24
bytes for each, stay near the cache, or are worth about 14 launches."""
SMALL = 4096
"""Regular parameters of fewer entries are kept in full, as by bitsandbytes and torchao: they weigh nothing."""

Shape = tuple[int, ...]


class Extent(NamedTuple):
    """A piece of R on this rank: its shape, and in which column of the whole R its rows begin.

    Rows are those of the first dim with all behind it; a vector is one row.
    """

    shape: Shape
    start: int = 0

    @property
    def table(self) -> tuple[int, int]:
        """Rows and entries of a row."""
        shape = self.shape
        return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))

    @property
    def phase(self) -> int:
        """Which entry of its block the first one of every row is."""
        return self.start % BLOCK

    @property
    def blocks(self) -> int:
        """Scales of the piece."""
        rows, width = self.table
        return rows * blocks_of(width, self.phase)


Turn = tuple[Tensors, Tensors, Sequence[Tensors]]
Read = Callable[[str], Tensor]


class Form(Protocol):
    """``blocky``: whether it matters how pieces lie in R."""

    @property
    def blocky(self) -> bool: ...

    def tensors(self, name: str, extents: Sequence[Extent], dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
        """What is kept of one moment, whatever the number of pieces: shapes and dtypes by key."""

    def views(
        self, moments: Sequence[Moment], extents: Sequence[Extent], store: Mapping[str, Tensor], prefix: str
    ) -> list[tuple[Any, ...]]:
        """For each piece its moments, in the memory of ``store``, whose keys begin with ``prefix``."""

    def numbers(self, view: Any, shape: Shape) -> Tensor:
        """A view's values, to be read only."""

    def flat(self, moment: Moment, extents: Sequence[Extent], kept: Read) -> Tensor:
        """The values of all pieces one behind the other, to be read only."""

    def write_(self, view: Any, values: Tensor) -> None:
        """Overwrite a view with values of the piece's shape."""

    def turns(
        self, params: Tensors, grads: Tensors, moments: Sequence[Sequence[Any]], elementwise: bool
    ) -> Iterator[Turn]:
        """What a rule is to update at a time, with one list of tensors for each moment; what it leaves in them is
        kept. ``moments`` has the views of each of ``params``.
        """


class Full:
    """Numbers as they are."""

    blocky = False

    def tensors(self, name: str, extents: Sequence[Extent], dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
        return {name: (_joint(extents), dtype)}

    def views(
        self, moments: Sequence[Moment], extents: Sequence[Extent], store: Mapping[str, Tensor], prefix: str
    ) -> list[tuple[Tensor, ...]]:
        columns = []  # without calls of our own: every matrix comes here at every step
        for moment in moments:
            whole = store[prefix + moment.name]
            if len(extents) != 1:
                columns.append(cut(whole, extents))
            else:  # nearly always, and then the tensor is of the piece's shape
                columns.append([whole if whole.shape == extents[0].shape else whole.view(extents[0].shape)])
        return list(zip(*columns, strict=True))

    def numbers(self, view: Tensor, shape: Shape) -> Tensor:
        return view

    def flat(self, moment: Moment, extents: Sequence[Extent], kept: Read) -> Tensor:
        return kept(moment.name).view(-1)

    def write_(self, view: Tensor, values: Tensor) -> None:
        view.copy_(values)

    def turns(
        self, params: Tensors, grads: Tensors, moments: Sequence[Sequence[Tensor]], elementwise: bool
    ) -> Iterator[Turn]:
        yield params, grads, list(zip(*moments, strict=True))


class EightBit:
    """Codes of a byte, and a scale for each block of a row, see ``eightbit``."""

    blocky = True

    def tensors(self, name: str, extents: Sequence[Extent], dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
        scales = sum(extent.blocks for extent in extents)
        return {name: (_joint(extents), CODE), name + SCALE: ((scales,), dtype)}

    def views(
        self, moments: Sequence[Moment], extents: Sequence[Extent], store: Mapping[str, Tensor], prefix: str
    ) -> list[tuple[Packed, ...]]:
        columns = [self._views(moment, extents, lambda key: store[prefix + key]) for moment in moments]
        return list(zip(*columns, strict=True))

    def _views(self, moment: Moment, extents: Sequence[Extent], kept: Read) -> list[Packed]:
        codes, scales = kept(moment.name).view(-1), kept(moment.name + SCALE)
        views, entry, scale = [], 0, 0
        for extent in extents:
            (rows, width), phase = extent.table, extent.phase
            blocks = blocks_of(width, phase)
            mine = codes[entry : entry + rows * width].view(rows, width)
            theirs = scales[scale : scale + rows * blocks].view(rows, blocks)
            views.append(Packed(mine, theirs, phase, bool(moment.signed)))
            entry, scale = entry + mine.numel(), scale + theirs.numel()
        assert (entry, scale) == (codes.numel(), scales.numel()), f"{moment.name}: pieces need {entry}, {scale}"
        return views

    def numbers(self, view: Packed, shape: Shape) -> Tensor:
        return view.wide().view(shape)

    def flat(self, moment: Moment, extents: Sequence[Extent], kept: Read) -> Tensor:
        parts = [view.wide().view(-1) for view in self._views(moment, extents, kept)]
        return torch.cat(parts) if parts else torch.empty_like(kept(moment.name + SCALE))

    def write_(self, view: Packed, values: Tensor) -> None:
        view.keep_(values.to(view.scales.dtype).reshape(view.codes.shape))

    def turns(
        self, params: Tensors, grads: Tensors, moments: Sequence[Sequence[Packed]], elementwise: bool
    ) -> Iterator[Turn]:
        for param, grad, own in zip(params, grads, moments, strict=True):
            if not param.numel():
                continue
            rows, width = own[0].codes.shape
            most = CUDA_SLICE if param.is_cuda else SLICE
            height = max(1, most // width) if elementwise else rows
            for top in range(0, rows, height):
                views = [view.rows(top, top + height) for view in own]
                shape = views[0].codes.shape if elementwise else param.shape
                wide = [view.wide().view(shape) for view in views]
                few = slice(top, top + height)
                now = [one.view(rows, width)[few].view(shape) for one in (param, grad.contiguous())]
                yield [now[0]], [now[1]], [[one] for one in wide]
                for view, values in zip(views, wide, strict=True):
                    view.keep_(values.view(view.codes.shape))


FORMS: dict[str, Form] = {"full": Full(), "8bit": EightBit()}


def cut(whole: Tensor, extents: Sequence[Extent]) -> list[Tensor]:
    """Views of the pieces in one tensor that has them one behind the other."""
    sizes = [prod(extent.shape) for extent in extents]
    assert sum(sizes) == whole.numel(), f"{whole.numel()} elements, pieces need {sum(sizes)}"
    return [part.view(extent.shape) for part, extent in zip(whole.view(-1).split(sizes), extents, strict=True)]


def _joint(extents: Sequence[Extent]) -> Shape:
    return extents[0].shape if len(extents) == 1 else (sum(prod(extent.shape) for extent in extents),)


def entry_bytes(form: Form, names: Sequence[str], extents: Sequence[Extent], dtype: torch.dtype) -> int:
    """Bytes of all moments of some pieces."""
    return sum(
        prod(shape) * kind.itemsize for name in names for shape, kind in form.tensors(name, extents, dtype).values()
    )
