"""The state as it goes into ``state_dict`` and comes back: same engine, same ranks, bit for bit.

Only keys differ from the live state: where a rank holds a part of a tensor, its key names the rank. What
torch.distributed.checkpoint gets is in ``dcp_pieces.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from frugal_dist.engines.hooks import dcp_is_asking, dcp_losing_option
from frugal_dist.engines.pieces import Pieces
from frugal_dist.engines.plain import PlainStorage
from frugal_dist.notices import notice
from frugal_dist.projection.numerics import compute_dtype
from frugal_dist.projection.registry import PROJECTIONS
from frugal_dist.saving.dcp_pieces import (
    decoded_moments,
    decoded_regular,
    for_dcp,
    from_dense,
    regular_pieces,
    remainder_pieces,
    sizes_change,
)
from frugal_dist.sharding.collectives import gather_objects, together
from frugal_dist.sharding.placement import owner_layout
from frugal_dist.sharding.shard import Interval
from frugal_dist.sharding.tile import is_replicated
from frugal_dist.step.inputs import StepInputs, check_density, create_state, step_inputs
from frugal_dist.step.runtime import (
    LocalMatrix,
    LocalParameter,
    Runtime,
    basis_layout,
    basis_route,
    extents_of,
    local_selection,
    moment_names,
    regular_extents,
    route_to,
    tile_extents,
)
from frugal_dist.step.state import BESIDE_MOMENTS, COUNTERS, FREE, MatrixState
from frugal_dist.update.moment_storage import Shape
from frugal_dist.update.remainder import REMAINDER, keeps_remainders
from frugal_dist.update.rules import every_key

_PART = re.compile(r"^(?P<key>.*)@rank(?P<rank>\d+)of(?P<size>\d+)$")
Store = dict[str, Tensor]

ONLY_RANK_ZERO = (
    "Every rank holds a part of the optimizer's state, but checkpoints of Accelerate, Lightning and the HF Trainer "
    "keep rank 0's only. DDP: leave out shard_state=True, or give the HF Trainer "
    "callbacks=[FrugalCallback()] from frugal_dist.integrations.transformers. FSDP2: "
    '"state_dict_type": "SHARDED_STATE_DICT" with Accelerate and the HF Trainer, or FrugalCallback(portable=True) and '
    "Accelerate's portable_checkpoints from frugal_dist.integrations; with Lightning "
    "ModelParallelStrategy(save_distributed_checkpoint=True). Who saves with frugal_dist.checkpoint instead says so "
    "after building the optimizer: optimizer.saved_elsewhere = True."
)

PARTS = (
    "state_dict(): the ranks share the optimizer's state, so this is only rank 0's part of it. Let every rank save its "
    "own file, or use torch.distributed.checkpoint or frugal_dist.checkpoint; with shard_state=False each rank has all."
)


def pack_all(runtime: Runtime, state: MutableMapping[Tensor, Store]) -> dict[int, Store]:
    """The state of every parameter, by its id, in saved form. Tensors that need no change are not copied, but counters:
    alive they are parts of one tensor.
    """
    template = dcp_is_asking()
    inputs = step_inputs(runtime, state)
    packed = {
        id(param): {key: value.clone() if _is_counter(key) else value for key, value in store.items()}
        for param, store in state.items()
        if store
    }
    owner = {id(store): id(param) for param, store in state.items()}
    for mat in inputs.mats:
        if mat.state.has_moments():
            saved = MatrixState(packed[owner[id(mat.state.store)]], mat.state.prefix)
            present = decoded_moments(runtime, mat) if template and mat.state.coded else mat.state.kept()
            for name in mat.state.kept():
                saved.put(name, None)
            for name, value in present.items():
                part = _is_part(runtime, mat)
                if template:
                    value, part = for_dcp(runtime, mat, name, value, part)
                saved.put(_key(runtime, name, part), value)
            rest = mat.state.get(REMAINDER)
            if rest is not None and not (runtime.ranks.alone or is_replicated(mat.matrix.storage)):
                saved.put(REMAINDER, None)
                saved.put(_key(runtime, REMAINDER, not template), remainder_pieces(mat, rest) if template else rest)
    for one in inputs.regular:
        part, coded = _is_regular_part(runtime, one), template and one.state.coded
        if one.state.has_moments() and (part or coded):
            saved = MatrixState(packed[owner[id(one.state.store)]], one.state.prefix)
            present = decoded_regular(one) if coded else one.state.kept()
            rest = saved.get(REMAINDER)
            present |= {} if rest is None else {REMAINDER: rest}
            for name in (*one.state.kept(), REMAINDER):
                saved.put(name, None)
            for name, value in present.items():
                as_pieces = part and template and not isinstance(one.part, Interval)
                saved.put(
                    _key(runtime, name, part and not as_pieces), regular_pieces(one, value) if as_pieces else value
                )
    return packed


def has_parts(packed: Mapping[int, Store]) -> bool:
    """Whether other ranks hold the rest of some tensor."""
    parts = (_PART.match(key) or isinstance(value, Pieces) for store in packed.values() for key, value in store.items())
    return any(parts)


def is_one_of_many(runtime: Runtime, packed: Mapping[int, Store]) -> bool:
    """Whether this is rank 0's part of what replicas share; under DDP people are used to saving rank 0's alone."""
    return runtime.ranks.rank == 0 and isinstance(runtime.storage, PlainStorage) and has_parts(packed)


def refuse_to_lose(packed: Mapping[int, Store]) -> None:
    """ValueError if whoever asked for this state would keep one rank's parts only. Not a collective, but all ranks
    raise alike: which tensors are divided follows from the layout, and the options are the program's.
    """
    if not has_parts(packed):
        return
    option = dcp_losing_option()
    if option:
        raise ValueError(
            f"Every rank holds a part of the optimizer's state; with {option}=True torch.distributed.checkpoint would "
            "lose the others' parts. Leave it out for the optimizer (dcp.save and dcp.load write and read all parts), "
            "or use frugal_dist.checkpoint."
        )


def is_divided(runtime: Runtime, inputs: StepInputs) -> bool:
    """Whether the ranks of ``inputs`` hold different parts of the state. Collective."""
    here = any(_is_part(runtime, mat) for mat in inputs.mats)
    here = here or any(_is_regular_part(runtime, one) for one in inputs.regular)
    return any(gather_objects(runtime.ranks, here))


@dataclass(frozen=True)
class Loaded:
    """What was loaded and is not live yet. ``moved``, ``replaced``: as in groups.Saved. ``refused``: why it was not."""

    moved: str = ""
    replaced: str = ""
    refused: str = ""


def unpack_all(runtime: Runtime, state: MutableMapping[Tensor, Store], loaded: Loaded | None) -> None:
    """Turn what was loaded into live state. Collective; ValueError on all ranks alike if anything does not fit."""
    if not _all_loaded(runtime, loaded is not None):
        return
    assert loaded is not None

    def strip() -> None:
        if loaded.refused:
            raise ValueError(loaded.refused)
        _check_order(runtime, loaded.moved)
        for store in state.values():
            _strip_parts(runtime, store)

    together(runtime.ranks, strip)
    inputs = step_inputs(runtime, state)
    together(runtime.ranks, lambda: _check_keys(runtime, inputs, state))
    everyone = gather_objects(runtime.ranks, _summaries(inputs))
    _compare_counters(everyone)
    for mat in inputs.mats:
        _settle_layout(runtime, mat, [summaries[mat.matrix.name] for summaries in everyone])

    def adopt() -> None:
        for mat in inputs.mats:
            _adopt(runtime, mat)
        for one in inputs.regular:
            _check_regular(runtime, one)

    together(runtime.ranks, adopt)
    if loaded.replaced and runtime.ranks.rank == 0:
        notice(loaded.replaced)


def _check_order(runtime: Runtime, moved: str) -> None:
    """Where a matrix stands among the others decides who computes it, and which blocks are active."""
    chosen = (runtime.storage.options(i).get("projection") for i in range(len(runtime.originals)))
    blocks = any(name in PROJECTIONS and PROJECTIONS[name].family == "blocks" for name in chosen)
    if moved and (blocks or not runtime.ranks.alone):
        raise ValueError(
            f"{moved} stands elsewhere among the parameters than when the state was saved. Its state would be another "
            "one's: build the layers in the order they had, or load with frugal_dist.checkpoint."
        )


def _check_keys(runtime: Runtime, inputs: StepInputs, state: Mapping[Tensor, Store]) -> None:
    """Nothing that belongs to nobody, and nobody who has nothing while others of the group have state."""
    known: dict[int, set[str]] = {}
    groups: dict[int, list[tuple[str, bool, bool]]] = {}
    by_name = {original.name: original for original in runtime.originals}
    for mat in inputs.mats:
        keys = {mat.state.prefix + key for key in (*COUNTERS, *every_key(), *BESIDE_MOMENTS)}
        known.setdefault(id(mat.state.store), set()).update(keys)
        group = runtime.originals[mat.matrix.original].group
        groups.setdefault(group, []).append((mat.matrix.name, mat.state.get("updates") is not None, mat.frozen))
    for one in inputs.regular:
        keys = {one.state.prefix + key for key in ("step", *every_key(), REMAINDER)}
        known.setdefault(id(one.state.store), set()).update(keys)
        group = by_name[one.name].group
        groups.setdefault(group, []).append((one.name, one.state.get("step") is not None, one.frozen))
    for store in state.values():
        for key in store.keys() - known.get(id(store), store.keys()):
            raise ValueError(f"{_named(runtime, state, store)}the loaded state has {key!r}, which has no place here. "
                             "It was saved by another optimizer, or for parameters that were called otherwise or "
                             "treated otherwise (projected or not).")  # fmt: skip
    for members in groups.values():
        bare = [name for name, counted, frozen in members if not (counted or frozen)]
        if bare and any(counted for _, counted, _ in members):
            raise ValueError(
                f"{bare[0]}: the loaded state has nothing for it, but for others of its group. Parts of it are "
                "missing; parameters that are new need a group of their own."
            )


def _named(runtime: Runtime, state: Mapping[Tensor, Store], store: Store) -> str:
    """The parameter that a state is of, if it is of one."""
    names = [o.name for i, o in enumerate(runtime.originals) if state.get(runtime.storage.param(i)) is store]
    return f"{names[0]}: " if len(names) == 1 else ""


def _all_loaded(runtime: Runtime, loaded: bool) -> bool:
    answers = gather_objects(runtime.ranks, loaded)
    if any(answers) and not all(answers):
        raise ValueError(
            f"load_state_dict was called on rank {answers.index(True)}, but not on rank {answers.index(False)}. "
            "All ranks must load or none."
        )
    return loaded


@dataclass(frozen=True)
class StateSummary:
    """What must fit together: the counts of a matrix or a regular parameter, and how much of it is here."""

    counters: tuple[int | None, ...]
    elements: int


def _summaries(inputs: StepInputs) -> dict[str, StateSummary]:
    entries = [(mat.matrix.name, mat.state, mat.config) for mat in inputs.mats]
    entries += [(one.name, one.state, one.config) for one in inputs.regular]
    summaries = {}
    for name, state, config in entries:
        counters = [state.get(counter) for counter in COUNTERS]
        moment = state.get(moment_names(config)[0])
        counts = tuple(None if counter is None else int(counter) for counter in counters)
        summaries[name] = StateSummary(counts, 0 if moment is None else moment.numel())
    return summaries


def _compare_counters(everyone: Sequence[dict[str, StateSummary]]) -> None:
    for name, first in everyone[0].items():
        for rank, summaries in enumerate(everyone):
            if summaries[name].counters != first.counters:
                raise ValueError(
                    f"{name}: rank 0 loaded the counts {_counts(first)}, rank {rank} {_counts(summaries[name])}. "
                    "The ranks' files were saved at different steps, or one of them is missing."
                )


def _counts(summary: StateSummary) -> str:
    listed = [f"{name}={value}" for name, value in zip(COUNTERS, summary.counters, strict=True) if value is not None]
    return ", ".join(listed) or "nothing"


def _settle_layout(runtime: Runtime, mat: LocalMatrix, everyone: Sequence[StateSummary]) -> None:
    """Compute where the saved run did. The cost rule may choose otherwise now, if the density was changed meanwhile,
    and the owner may have been another one: groups that are added later change none.
    """
    size, matrix = mat.state.get("size"), mat.matrix
    if mat.family != "basis" or mat.empty or size is None:
        return
    elements = [summary.elements for summary in everyone]
    layouts = [basis_layout(runtime, mat, choice) for choice in (mat.config.compute_layout, "cut", "owner")]
    holders = [rank for rank, number in enumerate(elements) if number]
    if len(holders) == 1:
        layouts.append(owner_layout(len(elements), holders[0], matrix.rows, matrix.cols))
    for layout in layouts:
        extents = [tile_extents(mat.side, tiles, int(size)) for tiles in layout]
        if [sum(prod(extent.shape) for extent in own) for own in extents] == elements:
            runtime.routes[matrix.index] = route_to(runtime, mat, layout)
            if layout is layouts[-1] and len(holders) == 1:
                runtime.give_to(matrix.index, holders[0])
            return


def check_entries(state_dict: Mapping[str, Any]) -> None:
    """ValueError, naming it, for an entry that is no tensor, as torch leaves for a key that it looked for in vain, and
    for a count that is none, as casting all of the state leaves them.
    """
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        keys = ", ".join(map(repr, list(state_dict)[:5])) or "nothing"
        raise ValueError(
            f"The loaded state has no {missing[0]!r}, but {keys}: it is not what state_dict() of an optimizer gave."
        )
    for number, store in state_dict["state"].items():
        for key, value in store.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"The loaded state of parameter {number} has {key!r} of type {type(value).__name__}, where a "
                    "tensor belongs. It was saved by another optimizer, or with another state_full or projection."
                )
            if _is_counter(key) and not _is_exact(value):
                raise ValueError(
                    f"The loaded state of parameter {number} has {key}={value.tolist()} in {value.dtype}, which is no "
                    "exact count. Cast moments only, and leave counts the integers they were."
                )


def _is_counter(key: str) -> bool:
    return key.rpartition("/")[2] in COUNTERS


def _is_exact(counter: Tensor) -> bool:
    """Whether it is one whole number, and its dtype tells it from its neighbours."""
    if counter.numel() != 1 or counter.dtype == torch.bool or counter.is_complex():
        return False
    if not counter.is_floating_point():
        return True
    value = float(counter)
    return value.is_integer() and abs(value) < 2 / torch.finfo(counter.dtype).eps


def placed(store: Mapping[str, Tensor], device: torch.device) -> Store:
    """A copy for live use: counts on the CPU, the rest with the parameter, in its dtype, contiguous."""
    copies = {}
    with torch.inference_mode(False):  # what is made in it can be changed in it only
        for key, value in store.items():
            held = value.local if isinstance(value, Pieces) else value.detach()
            copied = held.clone(memory_format=torch.contiguous_format)
            copies[key] = copied.to("cpu", torch.int64).view(()) if _is_counter(key) else copied.to(device)
    return copies


def _key(runtime: Runtime, name: str, part: bool) -> str:
    return f"{name}@rank{runtime.ranks.rank}of{runtime.ranks.size}" if part else name


def _is_part(runtime: Runtime, mat: LocalMatrix) -> bool:
    """Whether ranks hold different moments of this matrix."""
    if runtime.ranks.alone:
        return False
    if mat.family == "basis" and not mat.empty:
        return not is_replicated(basis_route(runtime, mat).layout)
    return runtime.shard_replicas or not is_replicated(mat.matrix.storage)


def _is_regular_part(runtime: Runtime, one: LocalParameter) -> bool:
    return not runtime.ranks.alone and tuple(one.weight.shape) != one.shape


def _strip_parts(runtime: Runtime, store: Store) -> None:
    for key in list(store):
        match = _PART.match(key)
        if match is None:
            continue
        rank, size = int(match["rank"]), int(match["size"])
        if (rank, size) != (runtime.ranks.rank, runtime.ranks.size):
            raise ValueError(
                f"{match['key']!r} was saved by rank {rank} of {size}, but this is rank {runtime.ranks.rank} of "
                f"{runtime.ranks.size}. state_dict holds a rank's own part: save one file per rank or use "
                "torch.distributed.checkpoint; for another number of ranks use frugal_dist.checkpoint."
            )
        store[match["key"]] = store.pop(key)


def _adopt(runtime: Runtime, mat: LocalMatrix) -> None:
    state = mat.state
    counts = [count for count in map(state.get, COUNTERS) if count is not None]
    if not state.has_moments() and (not counts or (len(counts) == len(COUNTERS) and state.counter("refreshes") == 0)):
        return  # never stepped when it was saved, or frozen
    _check_remainder(runtime, mat.matrix.name, mat)
    missing = [name for name in (*COUNTERS, *moment_names(mat.config)) if state.get(name) is None]
    if missing:
        raise ValueError(
            f"{mat.matrix.name}: the loaded state has no {', '.join(missing)} for this rank. It was saved by another "
            "optimizer, another number of ranks, or only by rank 0."
        )
    check_density(mat)
    if state.counter("refreshes") == 0:  # zeros, in whatever size the density at that time made them
        state.drop()
        create_state(runtime, mat)
        return
    if mat.family == "basis" and not mat.empty:
        _check_basis(runtime, mat)
        _check_moments(runtime, mat)
    else:
        _adopt_coordinates(runtime, mat)
    state.convert(mat.dtype, mat.numbered)
    state.repack(mat.config, extents_of(runtime, mat), mat.dtype)


def _adopt_coordinates(runtime: Runtime, mat: LocalMatrix) -> None:
    """Also from the shape of the stored tile, which torch.distributed.checkpoint brings."""
    pieces = local_selection(runtime, mat).pieces
    for piece in pieces if sizes_change(runtime, mat) else ():  # one: shards are boxes
        for name in moment_names(mat.config):
            value = mat.state.get(name)
            if value is not None and value.shape == piece.size != piece.mine:
                mat.state.put(name, from_dense(mat, piece, value))
    _check_moments(runtime, mat)


def _check_moments(runtime: Runtime, mat: LocalMatrix) -> None:
    form, extents = mat.state.kept_as(mat.config).form, extents_of(runtime, mat)
    for name in moment_names(mat.config):
        for key, (shape, _) in form.tensors(name, extents, mat.dtype).items():
            _check_shape(runtime, mat, key, shape)


def _check_basis(runtime: Runtime, mat: LocalMatrix) -> None:
    if not basis_route(runtime, mat).tiles:
        return
    for name in mat.config.keeps:
        _check_shape(runtime, mat, name, FREE[name][0](mat.matrix.rows, mat.matrix.cols))
    for part, shape in mat.kept_shapes(mat.state.counter("size")).items():
        key = "basis" if mat.side != "full" else f"basis_{part}"
        _check_shape(runtime, mat, key, shape)
        if mat.numbered:
            _check_numbers(mat, key, mat.matrix.rows if part == "left" else mat.matrix.cols)


def _check_numbers(mat: LocalMatrix, key: str, length: int) -> None:
    """Who casts all of the state may lose which columns they are."""
    numbers = mat.state.get(key)
    assert numbers is not None
    wide = numbers.double()
    bounds = wide.new_tensor([-1.0]), wide.new_tensor([float(length)])
    if not bool((wide == wide.round()).all() and (torch.cat((bounds[0], wide, bounds[1])).diff() > 0).all()):
        raise ValueError(
            f"{mat.matrix.name}: the loaded {key} in {numbers.dtype} are no numbers of columns, rising and below "
            f"{length}. Cast moments only."
        )


def _check_shape(runtime: Runtime, mat: LocalMatrix, name: str, needed: Shape) -> None:
    value = mat.state.get(name)
    nothing = value is not None and value.numel() == 0 == prod(needed)  # the shape of nothing is what it was at first
    if value is None or (tuple(value.shape) != needed and not nothing):
        described = "nothing" if value is None else f"shape {tuple(value.shape)}"
        raise ValueError(
            f"{mat.matrix.name}: the loaded {name} has {described}, but density={mat.config.density:g}, projection="
            f"{mat.config.projection!r} on this rank needs {needed}. Load with the hyperparameters it was saved with."
            + _other_ranks(runtime)
        )


def _check_regular(runtime: Runtime, one: LocalParameter) -> None:
    step = one.state.get("step")
    if not one.state.has_moments() and (step is None or int(step) == 0):
        return  # never stepped when it was saved, or frozen
    if step is None:
        raise ValueError(f"{one.name}: the loaded state has moments, but no step." + _other_ranks(runtime))
    _check_remainder(runtime, one.name, one)
    config, extents = one.state.kept_as(one.config), regular_extents(one)
    for name in moment_names(config):
        for key, (needed, _) in config.form.tensors(name, extents, torch.float32).items():
            value = one.state.get(key)
            flat = config.form.blocky  # what lies in several pieces has no other shape
            needed = needed if flat else tuple(one.weight.shape)
            if value is None or (value.numel() != prod(needed) if flat else value.shape != one.weight.shape):
                described = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise ValueError(
                    f"{one.name}: the loaded {key} has {described}, this rank needs {needed}." + _other_ranks(runtime)
                )
    dtype = compute_dtype(one.weight.dtype)
    one.state.convert(dtype)
    one.state.repack(one.config, extents, dtype)


def _check_remainder(runtime: Runtime, name: str, one: LocalMatrix | LocalParameter) -> None:
    if not keeps_remainders(one.config):
        return
    value = one.state.get(REMAINDER)
    needed = one.shapes[0] if len(one.shapes) == 1 else (sum(map(prod, one.shapes)),)
    if value is None or value.dtype != torch.int16 or value.numel() != prod(needed):
        described = "no remainder" if value is None else f"a remainder of {value.dtype}, shape {tuple(value.shape)}"
        raise ValueError(
            f"{name}: the loaded state has {described}, but rounding='remainder' needs int16 and {needed} on this "
            "rank. Cast moments only; what was saved with another rounding can be loaded with that, and rounding set "
            "in param_groups afterwards." + _other_ranks(runtime)
        )
    one.state.put(REMAINDER, value.view(needed))


def _other_ranks(runtime: Runtime) -> str:
    """What else may be wrong where the state may be divided."""
    if runtime.ranks.alone:
        return ""
    return (
        " If another number of ranks or another shard_state saved it: load with shard_state as it was then (False for "
        "what one process saved), or save and load with frugal_dist.checkpoint, which fits all."
    )
