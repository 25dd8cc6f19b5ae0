"""Saving: which rectangles there are, who writes which, and one file per rank."""

from __future__ import annotations

import json
import secrets
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frugal_dist import engines, projection
from frugal_dist.checkpoint.disk import Written, appears, write_bytes
from frugal_dist.checkpoint.errors import CheckpointError, StorageError, together
from frugal_dist.checkpoint.extra import rng_state, serialized
from frugal_dist.checkpoint.files import place_of, prepare, publish, working_folder
from frugal_dist.checkpoint.index import INDEX, Index, extra_file, piece_key, tensor_file
from frugal_dist.checkpoint.parts import (
    BUFFER,
    WEIGHT,
    Chunk,
    Numbers,
    leftovers,
    module_of,
    regular_state_chunks,
    remainder_chunks,
    state_chunks,
    weight_chunks,
)
from frugal_dist.checkpoint.tensors import write_tensors
from frugal_dist.config import HYPERPARAMETERS, python_value
from frugal_dist.optimizer import Frugal
from frugal_dist.parameters.changes import matrix_options, regular_options
from frugal_dist.sharding.collectives import Ranks, gather_objects
from frugal_dist.sharding.tile import Tile
from frugal_dist.step.inputs import StepInputs
from frugal_dist.step.runtime import Runtime
from frugal_dist.step.state import COUNTERS

PATIENCE = 10.0
"""Seconds that a network file system gets to show rank 0's new folder to the other ranks."""

Shapes = dict[str, tuple[int, int]]


def write_checkpoint(
    path: Path, model_or_engine: Any, frugal: Frugal, extra: dict[str, Any] | None, ranks: Ranks
) -> None:
    """Write everything that ``ranks`` have to ``path``, see ``savers``. Collective.

    Raises a CheckpointError on all ranks alike; nothing is left then.
    """
    runtime, now = frugal.everything()
    final = place_of(path)
    first = ranks.rank == 0
    token = str(gather_objects(ranks, secrets.token_hex(8))[0])
    chunks = together(ranks, lambda: _all_chunks(runtime, now, model_or_engine))
    record = together(ranks, lambda: serialized(_record(model_or_engine, extra, token)))
    stage = together(ranks, lambda: _stage(runtime, now, model_or_engine))
    whole = _united(gather_objects(ranks, stage))
    mine, shapes = _divide(ranks, chunks)
    working = working_folder(final, token)
    try:
        together(ranks, lambda: prepare(final, working) if first else None)
        together(ranks, lambda: _wait_for(working, ranks.rank))
        written = together(ranks, lambda: _write_rank(working, ranks.rank, mine, record, token))
        everyone = gather_objects(ranks, (written, [(chunk.name, chunk.area) for chunk in mine], _counters(now)))

        def finish() -> None:
            index = _index(whole, token, shapes, everyone)
            write_bytes(working / INDEX, index.to_bytes())
            publish(working, final)

        together(ranks, lambda: finish() if first else None)
    except CheckpointError:
        if first:
            shutil.rmtree(working, ignore_errors=True)
        raise


def _all_chunks(runtime: Runtime, now: StepInputs, model_or_engine: Any) -> list[Chunk]:
    last = Numbers()
    chunks = [*weight_chunks(runtime, now), *remainder_chunks(runtime, now)]
    chunks += [chunk for _, chunk in regular_state_chunks(runtime, now, last)]
    chunks += [chunk for mat in now.mats for chunk in state_chunks(runtime, mat, last)]
    return [*chunks, *(chunk for one in leftovers(runtime, model_or_engine) for chunk in one.chunks)]


def _record(model_or_engine: Any, extra: dict[str, Any] | None, token: str) -> dict[str, Any]:
    if extra is not None and not isinstance(extra, Mapping):
        raise CheckpointError(f'extra must be a dict, not {type(extra).__name__}: pass {{"NAME": ...}}.')
    return {
        "checkpoint": token,
        "extra": dict(extra or {}),
        "engine": engines.counts_of(model_or_engine),
        "rng": rng_state(),
    }


def _divide(ranks: Ranks, chunks: Sequence[Chunk]) -> tuple[list[Chunk], Shapes]:
    """Each rectangle has one writer, of its holders the one with the least to write; the shapes of all tensors.

    Buffers may differ from rank to rank; they all come from the first, also where several stages have one.
    """
    everyone = gather_objects(ranks, [(chunk.name, chunk.area, chunk.shape) for chunk in chunks])
    held: dict[tuple[str, Tile], list[int]] = {}
    shapes: Shapes = {}
    for rank, pieces in enumerate(everyone):
        for name, area, shape in pieces:
            held.setdefault((name, area), []).append(rank)
            shapes[name] = shape
    written_by = [0] * ranks.size
    writer = {}
    for piece in sorted(held, key=lambda piece: (len(held[piece]) > 1, -piece[1].numel)):
        name, area = piece
        chosen = held[piece][0] if name.startswith(BUFFER) else min(held[piece], key=lambda rank: written_by[rank])
        writer[piece] = chosen
        written_by[chosen] += area.numel
    return [chunk for chunk in chunks if writer[chunk.name, chunk.area] == ranks.rank], shapes


def _wait_for(working: Path, rank: int) -> None:
    if not appears(working, PATIENCE):
        raise StorageError(
            f"{working}, which rank 0 has just made, is not there for rank {rank}. A checkpoint needs a folder that "
            "all ranks share: a network file system if they run on several machines."
        )


def _write_rank(working: Path, rank: int, mine: Sequence[Chunk], record: bytes, token: str) -> dict[str, Written]:
    tensors: list[tuple[str, Tensor]] = [(piece_key(chunk.name, chunk.area), chunk.data) for chunk in mine]
    later = {piece_key(chunk.name, chunk.area): chunk.later for chunk in mine if chunk.later is not None}
    return {
        tensor_file(rank): write_tensors(working / tensor_file(rank), tensors, {"checkpoint": token}, later),
        extra_file(rank): write_bytes(working / extra_file(rank), record),
    }


# --- the index --------------------------------------------------------------------------------------

Counters = dict[str, dict[str, int]]
Stage = dict[str, Any]
"""What the index says of a stage, of the model if there is one only: entries of ``Index``, without counts."""


def _stage(runtime: Runtime, now: StepInputs, model_or_engine: Any) -> Stage | None:
    """Of the stage of which this rank is the first; the others know the same."""
    if runtime.ranks.rank != 0:
        return None
    others = leftovers(runtime, model_or_engine)
    return {
        "parameters": {original.name: list(original.shape) for original in runtime.originals}
        | {one.name: list(one.shape) for one in others if one.key.startswith(WEIGHT)},
        "buffers": {one.name: list(one.shape) for one in others if one.key.startswith(BUFFER)},
        "matrices": {mat.matrix.name: matrix_options(mat) for mat in now.mats},
        "regular": {one.name: regular_options(one) for one in now.regular},
        "groups": _groups(runtime),
        "model_config": _model_config(model_or_engine),
    }


def _united(stages: Sequence[Stage | None]) -> Stage:
    """The whole model. CheckpointError if stages give different things the same name: all ranks see the same."""
    whole: Stage = {}
    for rank, stage in enumerate(stages):
        if stage is None:
            continue
        if not whole:
            whole = stage
            continue
        twice = [name for name in stage["parameters"] if name in whole["parameters"]]
        twice += [name for name, shape in stage["buffers"].items() if whole["buffers"].get(name, shape) != shape]
        if twice:
            raise CheckpointError(
                f"{twice[0]} is the name of a tensor of rank {rank} and of one of a stage before. Each stage saves its "
                "own layers, under the names that they have in the whole model."
            )
        whole = {
            **{key: whole[key] | stage[key] for key in ("parameters", "buffers", "matrices", "regular")},
            "groups": whole["groups"] + stage["groups"],
            "model_config": whole["model_config"],
        }
    return whole


def _index(whole: Stage, token: str, shapes: Shapes, everyone: list[Any]) -> Index:
    counters = _latest_counters([counted for _, _, counted in everyone])
    counted = {
        kind: {name: {"clocks": counters[name], "depends_on": options} for name, options in whole[kind].items()}
        for kind in ("matrices", "regular")
    }
    return Index(
        identity=token,
        ranks=len(everyone),
        draws=fingerprint_of_draws(),
        files={name: written for files, _, _ in everyone for name, written in files.items()},
        tensors=shapes,
        pieces={tensor_file(rank): pieces for rank, (_, pieces, _) in enumerate(everyone)},
        **{**whole, **counted},
    )


def _counters(now: StepInputs) -> Counters:
    counters = {mat.matrix.name: {name: mat.state.counter(name) for name in COUNTERS} for mat in now.mats}
    return counters | {one.name: {"step": one.state.counter("step")} for one in now.regular}


def _latest_counters(everyone: Sequence[Counters]) -> Counters:
    """A rank that had no gradient may be behind; the others' counts hold, as they do at a refresh."""
    latest: Counters = {}
    for each in everyone:
        for name, counts in each.items():
            known = latest.setdefault(name, counts)
            latest[name] = {key: max(count, known[key]) for key, count in counts.items()}
    return latest


def _groups(runtime: Runtime) -> list[dict[str, Any]]:
    """Hyperparameters of this moment: schedulers move them, and leave numbers of their own in the groups."""
    groups: dict[int, dict[str, Any]] = {}
    for i, original in enumerate(runtime.originals):
        options = runtime.storage.options(i)
        group = groups.setdefault(id(options), {"members": [], "options": _plain_options(options)})
        group["members"].append(original.name)
    return list(groups.values())


def _plain_options(options: dict[str, Any]) -> dict[str, Any]:
    kept = {key: python_value(value) for key, value in options.items() if key != "projected"}
    return {
        key: value
        for key, value in kept.items()
        if key in HYPERPARAMETERS or isinstance(value, (int, float, str, bool))
    }


def _model_config(model_or_engine: Any) -> dict[str, Any] | None:
    """The configuration of a Hugging Face model, as JSON; it makes the export easier."""
    text = getattr(getattr(module_of(model_or_engine), "config", None), "to_json_string", None)
    if text is None:
        return None
    try:
        plain = json.loads(text())
    except (TypeError, ValueError):
        return None
    return plain if isinstance(plain, dict) else None


def fingerprint_of_draws() -> int:
    """Of the numbers that select_indices draws here: another torch may draw others, and state would be misplaced."""
    few = projection.select_indices(1000, 100, seed=0, name="fingerprint", refresh=0)
    many = projection.select_indices(20000, 500, seed=0, name="fingerprint", refresh=0)
    return zlib.crc32(repr(torch.cat([few, many]).tolist()).encode())
