"""Portable checkpoints: save on any engine and number of ranks, load on any other, and go on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from frugal_dist import engines
from frugal_dist.checkpoint.files import (
    Reader,
    complete_folder,
    publish,
    rank_file,
    read_index,
    write_index,
    write_rank,
)
from frugal_dist.checkpoint.parts import Chunk, regular_state_chunks, state_chunks, weight_chunks
from frugal_dist.config import check_choice
from frugal_dist.optimizer import Frugal
from frugal_dist.sharding.exchange import Ranks, gather_objects
from frugal_dist.sharding.tile import Tile
from frugal_dist.state import CLOCKS
from frugal_dist.work import Runtime, Work, basis_piece_shapes, basis_route, coordinate_cut, moment_names
from frugal_dist.workload import Load, ensure_state

__all__ = ["load", "save"]

T = TypeVar("T")

CHECKED = ("projection", "side", "density", "state_full", "block_order", "seed")
"""Hyperparameters that the low-rank state depends on."""


def save(
    path: str | os.PathLike[str], model_or_engine: Any, optimizer: Any, extra: dict[str, Any] | None = None
) -> None:
    """Save weights, optimizer state and ``extra`` to the folder ``path``. Collective: every rank calls it.

    ``optimizer`` is a Frugal or a wrapper around one (``engine.optimizer``). ``extra`` is the rank's own: anything that
    ``torch.load(weights_only=True)`` can read, such as RNG states, data positions, scheduler state dicts.
    A folder of the same name is replaced only when the new one is complete. Raises OSError or ValueError on all ranks
    alike if any of them fails; the previous checkpoint is untouched then.
    """
    frugal = unwrap(optimizer)
    runtime, now = frugal.everything()
    final = Path(path)
    working = final.with_name(f".{final.name}.partial")
    chunks = [*weight_chunks(runtime, now), *regular_state_chunks(runtime, now)]
    chunks += [chunk for work in now.works for chunk in state_chunks(runtime, work)]
    chunks += _unoptimized(runtime, model_or_engine)
    mine, shapes = _divide(runtime.ranks, chunks)
    _together(runtime.ranks, lambda: _prepare(working) if runtime.ranks.rank == 0 else None)
    names = {str(number): chunk for number, chunk in enumerate(mine)}
    pieces = {key: chunk.data.detach().cpu().contiguous().clone() for key, chunk in names.items()}
    record = {"extra": extra or {}, "engine": engines.counts_of(model_or_engine)}
    size = _together(runtime.ranks, lambda: write_rank(working, runtime.ranks.rank, pieces, record))
    listed = [[key, chunk.name, chunk.area.rows, chunk.area.cols] for key, chunk in names.items()]
    written = gather_objects(runtime.ranks, (size, listed))

    def finish() -> None:
        if runtime.ranks.rank == 0:
            index = {
                "files": {rank_file(rank): size for rank, (size, _) in enumerate(written)},
                "pieces": {rank_file(rank): entries for rank, (_, entries) in enumerate(written)},
                "shapes": shapes,
                "clocks": _clocks(now),
                "options": _options(now),
            }
            write_index(working, index)
            publish(working, final)

    _together(runtime.ranks, finish)


def load(
    path: str | os.PathLike[str], model_or_engine: Any, optimizer: Any, on_mismatch: str = "error"
) -> dict[str, Any]:
    """Load what ``save`` wrote, on whatever engine and number of ranks runs now; returns this rank's ``extra``.

    With as many ranks as saved it, every rank gets its own ``extra`` back, further ranks get rank 0's.
    ``on_mismatch``: "error", or "refresh": if hyperparameters changed that the low-rank state depends on, keep the
    weights and counts and start with a fresh subspace at the next step.
    Raises ValueError on all ranks alike, naming the file and what differs; nothing is changed then.
    """
    check_choice("on_mismatch", on_mismatch, ("error", "refresh"))
    frugal = unwrap(optimizer)
    runtime, now = frugal.everything()
    folder = complete_folder(Path(path))
    reader = Reader(folder, _together(runtime.ranks, lambda: read_index(folder)))
    fresh = _together(runtime.ranks, lambda: _compare(runtime, now, reader, on_mismatch))
    record = _together(runtime.ranks, lambda: reader.record(runtime.ranks.rank))
    _together(runtime.ranks, lambda: _read_all(runtime, now, reader, model_or_engine, fresh))
    frugal.loaded()
    engines.after_loading(model_or_engine, record["engine"])
    extra: dict[str, Any] = record["extra"]
    return extra


def unwrap(optimizer: Any) -> Frugal:
    """The Frugal inside DeepSpeed's or Accelerate's wrappers."""
    inner = optimizer
    while inner is not None and not isinstance(inner, Frugal):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise ValueError(f"{type(optimizer).__name__} does not contain a Frugal optimizer.")
    return inner


# --- saving ---------------------------------------------------------------------------------------------------------


def _prepare(working: Path) -> None:
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)


def _divide(ranks: Ranks, chunks: Sequence[Chunk]) -> tuple[list[Chunk], dict[str, tuple[int, int]]]:
    """Each rectangle is written by the first rank that holds it; the shapes of all tensors."""
    everyone = gather_objects(ranks, [(chunk.name, chunk.area, chunk.shape) for chunk in chunks])
    writer: dict[tuple[str, object], int] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for rank, held in enumerate(everyone):
        for name, area, shape in held:
            writer.setdefault((name, area), rank)
            shapes[name] = shape
    return [chunk for chunk in chunks if writer[chunk.name, chunk.area] == ranks.rank], shapes


def _clocks(now: Load) -> dict[str, dict[str, int]]:
    found = {}
    for work in now.works:
        if work.state.get("updates") is not None:
            found[work.matrix.name] = {name: work.state.clock(name) for name in CLOCKS}
    for one in now.regular:
        if one.state.get("step") is not None:
            found[one.name] = {"step": one.state.clock("step")}
    return found


def _options(now: Load) -> dict[str, dict[str, Any]]:
    return {work.matrix.name: {key: getattr(work.config, key) for key in CHECKED} for work in now.works}


def _unoptimized(runtime: Runtime, model_or_engine: Any) -> list[Chunk]:
    """Buffers and parameters that the optimizer does not hold; whole on every rank."""
    known = {original.name for original in runtime.originals}
    return [
        Chunk(f"model/{name}", _two(tensor), _area(tensor), _matrix(tensor))
        for name, tensor in _others(model_or_engine, known)
    ]


def _others(model_or_engine: Any, known: set[str]) -> Iterable[tuple[str, Tensor]]:
    module: nn.Module = getattr(model_or_engine, "module", model_or_engine)
    saved = set(module.state_dict().keys())
    for name, tensor in module.named_buffers():
        if name in saved:
            yield name, tensor
    for name, param in module.named_parameters():
        if name not in known and not param.requires_grad and param.numel():
            yield name, engines.whole_tensor(param)


def _two(tensor: Tensor) -> tuple[int, int]:
    matrix = _matrix(tensor)
    return matrix.shape[0], matrix.shape[1]


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(1, -1) if tensor.dim() < 2 else tensor.detach().reshape(tensor.shape[0], -1)


def _area(tensor: Tensor) -> Tile:
    rows, cols = _two(tensor)
    return Tile((0, rows), (0, cols))


# --- loading --------------------------------------------------------------------------------------------------------


def _compare(runtime: Runtime, now: Load, reader: Reader, on_mismatch: str) -> bool:
    """Whether the low-rank state must start afresh. Shapes and names must fit in any case."""
    changed = []
    for work in now.works:
        name = work.matrix.name
        if name not in reader.index["options"]:
            raise ValueError(
                f"{reader.folder}: there is no projected matrix {name!r}; another model or another selection."
            )
        if reader.shape(f"weight/{name}") != (work.matrix.rows, work.matrix.cols):
            raise ValueError(
                f"{reader.folder}: {name} was {reader.shape(f'weight/{name}')}, now it is "
                f"{(work.matrix.rows, work.matrix.cols)}."
            )
        then = reader.index["options"][name]
        changed += [f"{key} {then[key]!r} -> {getattr(work.config, key)!r}" for key in CHECKED
                    if then[key] != getattr(work.config, key)]  # fmt: skip
    if changed and on_mismatch == "error":
        listed = "; ".join(sorted(set(changed)))
        raise ValueError(
            f"{reader.folder} was saved with other hyperparameters: {listed}. Use the saved ones, or "
            'on_mismatch="refresh" to keep the weights and start with a fresh subspace.'
        )
    return bool(changed)


def _read_all(runtime: Runtime, now: Load, reader: Reader, model_or_engine: Any, fresh: bool) -> None:
    ensure_state(runtime, now)
    for chunk in [*weight_chunks(runtime, now), *_unoptimized(runtime, model_or_engine)]:
        reader.fill(chunk.name, chunk.shape, chunk.area, chunk.data)
    clocks = reader.index["clocks"]
    for one in now.regular:
        one.state.set_clock("step", clocks.get(one.name, {"step": 0})["step"])
    chunks = list(regular_state_chunks(runtime, now))
    for work in now.works:
        _restore_matrix(runtime, work, clocks.get(work.matrix.name), fresh)
        chunks += [] if fresh else list(state_chunks(runtime, work))
    for chunk in chunks:
        if reader.shape(chunk.name) is not None:
            reader.fill(chunk.name, chunk.shape, chunk.area, chunk.data)


def _restore_matrix(runtime: Runtime, work: Work, clocks: dict[str, int] | None, fresh: bool) -> None:
    """Set the counts, then make room for the state that goes with them."""
    if clocks is None:
        return
    kept = {**clocks, "refreshes": 0, "refreshed_at": -1, "step": 0} if fresh else clocks
    for name in CLOCKS:
        work.state.set_clock(name, kept[name])
    if fresh or work.empty or kept["refreshes"] == 0:
        return
    names = moment_names(work.config)
    if work.family != "basis":
        runtime.cuts.pop(work.matrix.index, None)
        shapes = [piece.mine for piece in coordinate_cut(runtime, work).pieces]
        work.state.ensure_moments(names, shapes, work.dtype, work.device)
        return
    plan = basis_route(runtime, work)
    work.state.ensure_moments(names, basis_piece_shapes(work, plan, kept["size"]), work.dtype, work.device)
    if plan.tiles:
        shape = (work.matrix.rows, work.matrix.cols)
        work.state.ensure_basis(work.side, shape, kept["size"], work.dtype, work.device)


def _together(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run ``action`` everywhere; this rank's result, or the first rank's error on all ranks alike."""
    result, problem = None, ""
    try:
        result = action()
    except (OSError, ValueError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}"
    for rank, text in enumerate(gather_objects(ranks, problem)):
        if text:
            raise ValueError(text if ranks.alone else f"rank {rank}: {text}")
    return cast("T", result)
