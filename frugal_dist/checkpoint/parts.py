"""The canonical form: every tensor by parameter name in its whole shape, a rank's part as rectangles of it.

Parameters are seen as (first dim, rest), moments and bases of matrices in their own shapes, a stack's member as
"name[e]". So what one engine wrote any other can read, on any number of ranks. What a model holds beside the
optimizer's parameters comes along: parameters that nobody optimizes, and buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from frugal_dist import engines
from frugal_dist.checkpoint.errors import CheckpointError
from frugal_dist.config import FrugalConfig
from frugal_dist.parameters.names import clean_name
from frugal_dist.projection.coordinates import Selection
from frugal_dist.sharding.shard import Box, Grid, Interval, LocalShard, ParamSpec
from frugal_dist.sharding.tile import Tile, interval_tiles
from frugal_dist.step.inputs import StepInputs
from frugal_dist.step.runtime import (
    CoordinatePiece,
    LocalMatrix,
    LocalParameter,
    Runtime,
    basis_extents,
    basis_route,
    local_selection,
    moment_names,
    regular_extents,
    whole_selection,
)
from frugal_dist.step.state import KEPT, MatrixState
from frugal_dist.update.moment_storage import Extent, cut
from frugal_dist.update.remainder import REMAINDER

WEIGHT = "weight/"
"""Of the names of parameters in a checkpoint, whether anybody optimizes them or not."""
LOW = "remainder/"
"""Of the names of what rounding left of a parameter, see ``update.remainder``."""
BUFFER = "buffer/"
"""Of the names of buffers in a checkpoint."""


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a named 2-D tensor, and the live memory that holds it on this rank.

    ``data`` is a view of that memory. Where no 2-D view of it exists (channels-last weights), or not every element has
    memory of its own (expanded buffers), it is a copy, and ``owner`` is what has to be overwritten with it. What is
    kept in another form (8-bit moments) is made by ``later`` when it is written; ``data`` only has its shape and dtype.
    """

    name: str
    shape: tuple[int, int]
    area: Tile
    data: Tensor
    owner: Tensor | None = None
    later: Callable[[], Tensor] | None = None

    def settle(self) -> None:
        """After ``data`` was filled: bring it where it belongs."""
        if self.owner is not None:
            with torch.inference_mode(self.owner.is_inference()):
                _once(self.owner).copy_(_once(self.owner, self.data.view(self.owner.shape)))

    @property
    def repeats(self) -> bool:
        """Whether some elements share their memory."""
        return self.owner is not None and _repeats(self.owner)

    def has_room_for(self, values: Tensor) -> bool:
        """Whether elements that share their memory get the same value."""
        assert self.owner is not None
        whole = values.view(self.owner.shape)
        return torch.equal(_once(self.owner, whole).expand_as(whole), whole)


def _repeats(tensor: Tensor) -> bool:
    """Whether one element of memory stands for several, as in an expanded view."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _once(owner: Tensor, values: Tensor | None = None) -> Tensor:
    """The part of ``values``, or of ``owner`` itself, in which every element of ``owner``'s memory is named once."""
    unique = owner if values is None else values
    for dim, (stride, size) in enumerate(zip(owner.stride(), owner.shape, strict=True)):
        if stride == 0 and size > 1:
            unique = unique.narrow(dim, 0, 1)
    return unique


class Numbers:
    """The moment that was made numbers last, as it was cut: there is room for one at a time."""

    def __init__(self) -> None:
        self._key: object = None
        self._parts: list[Tensor] = []

    def part(self, key: object, number: int, make: Callable[[], list[Tensor]]) -> Tensor:
        """Part ``number`` of what ``make`` gives for ``key``."""
        if self._key is not key:
            self._parts = []
            self._key, self._parts = key, make()
        return self._parts[number]


def weight_chunks(runtime: Runtime, inputs: StepInputs) -> Iterator[Chunk]:
    """The weights the optimizer updates: fp32 masters where the engine keeps them."""
    for mat in inputs.mats:
        yield from _cut_as_weights(runtime, WEIGHT, mat, mat.weights)
    for i, one in regular_entries(runtime, inputs):
        yield from part_chunks(WEIGHT + one.name, one.shape, runtime.storage.part(i), one.weight)


def remainder_chunks(runtime: Runtime, inputs: StepInputs) -> Iterator[Chunk]:
    """What rounding left of them, where that is kept: cut as the weights are."""
    for mat in inputs.mats:
        if mat.state.get(REMAINDER) is not None:
            yield from _cut_as_weights(runtime, LOW, mat, mat.state.pieces(REMAINDER, mat.shapes))
    for i, one in regular_entries(runtime, inputs):
        rest = one.state.get(REMAINDER)
        if rest is not None:
            yield from part_chunks(LOW + one.name, one.shape, runtime.storage.part(i), rest)


def _cut_as_weights(runtime: Runtime, kind: str, mat: LocalMatrix, pieces: Sequence[Tensor]) -> Iterator[Chunk]:
    original = runtime.originals[mat.matrix.original]
    for tile, piece in zip(mat.tiles, pieces, strict=True):
        if len(original.shape) == 2:
            yield Chunk(kind + original.name, (mat.matrix.rows, mat.matrix.cols), tile, piece)
        else:
            yield from _member_chunks(kind, original, mat.matrix.member, tile, piece)


def _member_chunks(kind: str, original: ParamSpec, member: int, tile: Tile, weight: Tensor) -> Iterator[Chunk]:
    """Part of one matrix of a stack, which is a row of the stack: whole rows of the matrix, or each of them."""
    width = original.shape[-1]
    spans = [tile.rows] if tile.width == width else [(row, row + 1) for row in range(*tile.rows)]
    for top, bottom in spans:
        start = top * width + tile.cols[0]
        local = weight[top - tile.rows[0] : bottom - tile.rows[0]]
        flat = local.reshape(1, -1)
        area = Tile((member, member + 1), (start, start + flat.numel()))
        yield Chunk(
            kind + original.name, flat_shape(original.shape), area, flat, None if _is_view(flat, local) else local
        )


def regular_entries(runtime: Runtime, inputs: StepInputs) -> list[tuple[int, LocalParameter]]:
    """The regular parameters of a call with their positions among the originals."""
    positions = [i for i in inputs.key if not runtime.originals[i].projected]
    return list(zip(positions, inputs.regular, strict=True))


def regular_state_chunks(
    runtime: Runtime, inputs: StepInputs, last: Numbers | None = None
) -> Iterator[tuple[str, Chunk]]:
    """The moments of regular parameters, cut as their weights are, each with its parameter's name. Frozen ones may have
    none. ``last``: what all that is written together shares.
    """
    last = last or Numbers()
    for i, one in regular_entries(runtime, inputs):
        if not one.state.has_moments():
            continue
        extents, shape = regular_extents(one), tuple(one.weight.shape)
        for name in moment_names(one.config):
            parts = partial(part_chunks, f"state/{one.name}/{name}", one.shape, runtime.storage.part(i))
            for chunk in _moment_chunks(one.state, one.config, extents, name, shape, parts, last):
                yield one.name, chunk


def _moment_chunks(
    state: MatrixState,
    config: FrugalConfig,
    extents: Sequence[Extent],
    name: str,
    shape: Sequence[int],
    cut_up: Callable[[Tensor], Iterable[Chunk]],
    last: Numbers,
) -> Iterator[Chunk]:
    """A moment as ``cut_up`` cuts its numbers, which have ``shape``, with all pieces one behind the other."""
    config = state.kept_as(config)

    def numbers() -> Tensor:
        return state.flat(config, extents, only=name)[name].view(tuple(shape))

    if not config.form.blocky:
        yield from cut_up(numbers())
        return
    key = object()
    described = torch.empty(tuple(shape), dtype=state.moments_dtype(), device="meta")
    for number, chunk in enumerate(cut_up(described)):
        yield replace(chunk, later=partial(last.part, key, number, lambda: [one.data for one in cut_up(numbers())]))


def state_chunks(runtime: Runtime, mat: LocalMatrix, last: Numbers | None = None) -> Iterator[Chunk]:
    """Moments and basis of one matrix as this rank holds them."""
    if mat.empty or mat.state.get("updates") is None or mat.state.counter("refreshes") == 0:
        return
    yield from _BY_FAMILY[mat.family](runtime, mat, last or Numbers())


def _basis_chunks(runtime: Runtime, mat: LocalMatrix, last: Numbers) -> Iterator[Chunk]:
    plan, r, matrix = basis_route(runtime, mat), mat.state.counter("size"), mat.matrix
    if not plan.tiles:
        return
    prefix = f"state/{matrix.name}/"
    for key in KEPT:
        part = mat.state.get(key)
        if part is not None:
            table = part if part.dim() == 2 else part.view(1, -1)  # numbers of columns, or norms
            yield Chunk(prefix + key, (table.shape[0], table.shape[1]), _all_of(table), table)
    shape = {"right": (matrix.rows, r), "left": (r, matrix.cols), "full": (r, r)}[mat.side]
    extents = basis_extents(mat, plan, r)

    def cut_up(name: str, flat: Tensor) -> Iterator[Chunk]:
        for tile, piece in zip(plan.tiles, cut(flat, extents), strict=True):
            rows = tile.rows if mat.side == "right" else (0, r)
            cols = tile.cols if mat.side == "left" else (0, r)
            yield Chunk(prefix + name, shape, Tile(rows, cols), piece)

    yield from _all_moments(mat, extents, cut_up, last)


def _all_moments(
    mat: LocalMatrix, extents: Sequence[Extent], cut_up: Callable[[str, Tensor], Iterator[Chunk]], last: Numbers
) -> Iterator[Chunk]:
    size = sum(prod(extent.shape) for extent in extents)
    for name in moment_names(mat.config):
        yield from _moment_chunks(mat.state, mat.config, extents, name, (size,), partial(cut_up, name), last)


def _coordinate_chunks(runtime: Runtime, mat: LocalMatrix, last: Numbers) -> Iterator[Chunk]:
    selection = local_selection(runtime, mat)
    if selection.nothing:
        return
    whole = whole_selection(mat, mat.state.counter("refreshes") - 1, mat.state.counter("size"))
    shape = two_dims(whole.shape(mat.matrix.rows, mat.matrix.cols))

    def cut_up(name: str, flat: Tensor) -> Iterator[Chunk]:
        for piece, values in zip(selection.pieces, cut(flat, selection.extents), strict=True):
            for area, view in _slot_views(whole, piece, values, shape[1]):
                yield Chunk(f"state/{mat.matrix.name}/{name}", shape, area, view)

    yield from _all_moments(mat, selection.extents, cut_up, last)


_BY_FAMILY = {"basis": _basis_chunks, "coordinates": _coordinate_chunks, "blocks": _coordinate_chunks}


def _slot_views(whole: Selection, piece: CoordinatePiece, values: Tensor, width: int) -> Iterator[tuple[Tile, Tensor]]:
    """A share of R as rectangles of the whole R: one, unless the selected entries of a tile are scattered over it."""
    if values.numel() == 0:
        return
    start, stop = piece.my_bounds
    slots = whole.slots(piece.tile).reshape(piece.shape).narrow(piece.selection.free_dim, start, stop - start)
    table, data = (slots.view(1, -1), values.view(1, -1)) if slots.dim() == 1 else (slots, values)
    for top, bottom, row in _runs(table[:, 0] // width):
        for left, right, col in _runs(table[0] % width):
            area = Tile((row, row + bottom - top), (col, col + right - left))
            yield area, data[top:bottom, left:right]


def _runs(ids: Tensor) -> Iterator[tuple[int, int, int]]:
    """Maximal stretches of consecutive numbers: (start, stop, first number)."""
    breaks = (torch.nonzero(ids[1:] != ids[:-1] + 1).view(-1) + 1).tolist()
    for start, stop in zip([0, *breaks], [*breaks, ids.numel()], strict=True):
        yield start, stop, int(ids[start])


def part_chunks(name: str, shape: Sequence[int], part: LocalShard, local: Tensor) -> Iterator[Chunk]:
    """This rank's part of a tensor that is no projected matrix."""
    if local.numel():
        yield from _CHUNKS[type(part)](name, shape, part, local)


def _boxes_chunks(name: str, shape: Sequence[int], part: Box | Grid, local: Tensor) -> Iterator[Chunk]:
    for box, view in part.boxes(local):
        if len(shape) < 2:
            yield _rectangle(name, shape, Tile((0, 1), box.spans[0] if box.spans else (0, 1)), view)
        else:
            yield from _stretches(name, shape, box, view)


def _stretches(name: str, shape: Sequence[int], box: Box, local: Tensor) -> Iterator[Chunk]:
    """Several rectangles if a dim behind the second one is cut: the dims before it are gone through one by one."""
    inner, spans = shape[1:], box.spans[1:]
    last = max((dim for dim, span in enumerate(spans) if span != (0, inner[dim])), default=0)
    behind = prod(inner[last + 1 :])
    for index in product(*(range(*span) for span in spans[:last])):
        start = sum(i * prod(inner[dim + 1 :]) for dim, i in enumerate(index))
        columns = (start + spans[last][0] * behind, start + spans[last][1] * behind)
        view = local
        for dim, i in enumerate(index):
            view = view.select(1, i - spans[dim][0])
        yield _rectangle(name, shape, Tile(box.spans[0], columns), view)


def _rectangle(name: str, shape: Sequence[int], area: Tile, local: Tensor) -> Chunk:
    flat = local.reshape(area.height, area.width)
    if _repeats(local):
        flat = flat.clone(memory_format=torch.contiguous_format)
    return Chunk(name, flat_shape(shape), area, flat, None if _is_view(flat, local) else local)


def _is_view(view: Tensor, base: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def _interval_chunks(name: str, shape: Sequence[int], part: Interval, local: Tensor) -> Iterator[Chunk]:
    whole = flat_shape(shape)
    start = 0
    for tile in interval_tiles(part.start, part.stop, whole[1]):
        yield Chunk(name, whole, tile, local[start : start + tile.numel].view(tile.height, tile.width))
        start += tile.numel


_CHUNKS: dict[type, Callable[[str, Sequence[int], Any, Tensor], Iterator[Chunk]]] = {
    Box: _boxes_chunks,
    Grid: _boxes_chunks,
    Interval: _interval_chunks,
}


def flat_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A parameter's shape as two dims: (first, rest); vectors and scalars are one row."""
    return (1, prod(shape)) if len(shape) < 2 else (shape[0], prod(shape[1:]))


def two_dims(shape: Sequence[int]) -> tuple[int, int]:
    """R's shape as two dims: a flat selection is one row."""
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _all_of(tensor: Tensor) -> Tile:
    return Tile((0, tensor.shape[0]), (0, tensor.shape[1]))


# --- beside the optimizer's parameters ------------------------------------------------------------


@dataclass(frozen=True)
class Leftover:
    """A tensor of the model: its whole shape, which part of it is on this rank, and that part's memory."""

    key: str
    name: str
    shape: tuple[int, ...]
    part: LocalShard
    local: Tensor

    @property
    def chunks(self) -> Iterator[Chunk]:
        return part_chunks(self.key, self.shape, self.part, self.local.detach())


def leftovers(runtime: Runtime, model_or_engine: Any) -> list[Leftover]:
    """All of them, tied parameters once; no communication."""
    model = module_of(model_or_engine)
    known = {original.name for original in runtime.originals}
    saved = set(model.state_dict().keys())  # first: it makes FSDP2 give up whole parameters kept from a forward pass
    held = {id(runtime.storage.param(i)) for i in range(len(runtime.originals))}
    rest = []
    for name, param in model.named_parameters():
        plain = clean_name(name)
        if plain not in known and id(param) not in held:
            rest.append(Leftover(WEIGHT + plain, plain, *engines.stored_part(name, param)))
    for name, buffer in model.named_buffers():
        if name in saved and buffer.numel():
            _check_plain(name, buffer)
            plain, whole = clean_name(name), Box(tuple((0, size) for size in buffer.shape))
            rest.append(Leftover(BUFFER + plain, plain, tuple(buffer.shape), whole, buffer))
    return rest


def _check_plain(name: str, buffer: Tensor) -> None:
    """CheckpointError, naming the buffer, for what has no plain bytes."""
    what = "on the meta device, without values" if buffer.is_meta else f"sparse ({buffer.layout})"
    if buffer.is_meta or buffer.layout != torch.strided:
        raise CheckpointError(
            f"buffer {name} is {what}, and cannot be saved or loaded. Register it with persistent=False, or make it a "
            "plain tensor."
        )


def module_of(model_or_engine: Any) -> nn.Module:
    """The model inside DDP's or DeepSpeed's wrapper."""
    inner = getattr(model_or_engine, "module", model_or_engine)
    if not isinstance(inner, nn.Module):
        raise ValueError(f"expected a model or an engine, found {type(model_or_engine).__name__}.")
    return inner
