"""Storage under DeepSpeed: ZeRO-1/2/3, BF16_Optimizer, and stage 0.

ZeRO flattens and cuts parameters, so the optimizer sees 1-D partitions. Where each parameter lies in them is read from
what DeepSpeed keeps on the original parameters, and checked against the weights themselves before the first update.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from frugal_dist.engines.deepspeed import check_supported, is_engine, names_of
from frugal_dist.engines.hooks import deepspeed_engine_of
from frugal_dist.engines.plain import PlainStorage
from frugal_dist.sharding.collectives import Ranks
from frugal_dist.sharding.shard import Box, Interval, LocalShard, ParamSpec, Storage

Group = dict[str, Any]


def _belongs(source: Tensor) -> bool:
    """What DeepSpeed leaves on parameters, should the engine not be found (after gc.freeze, say)."""
    return any(hasattr(source, mark) for mark in ("_z3_optimizer", "_hp_mapping")) or names_of([source]) != [None]


def holds(model: Any, optimizer: object, params: Sequence[Tensor]) -> bool:
    """Whether DeepSpeed drives this model or optimizer, or will: zero.Init has cut its parameters."""
    if is_engine(model) or deepspeed_engine_of(optimizer) is not None:
        return True
    return any(hasattr(param, "ds_shape") or _belongs(param) for param in params)


@dataclass(frozen=True)
class FlatSlice:
    """Where this rank's part of a parameter lies: an interval of it, at ``offset`` of the flat tensor ``flat()``.

    ``low`` is the same part of the model's own (low-precision) weights, None if it cannot be looked at. ``source`` is
    the model's own parameter: the only one that tells whether it is frozen.
    """

    start: int
    numel: int
    offset: int
    flat: Callable[[], Tensor]
    low: Callable[[], Tensor | None]
    source: Tensor


Left = Sequence[tuple[ParamSpec, Tensor]]
"""Parameters that were frozen when the engine was built: DeepSpeed has no place for them, and hooks no gradients."""


@dataclass
class ZeroStorage:
    """``places`` has one entry per original; ``active`` gives the flat tensors that the running call is about.

    ``norm`` gives the norm of the whole gradient of this training step, None where DeepSpeed does not compute it.
    """

    originals: Sequence[ParamSpec]
    groups: Sequence[Group]
    places: Sequence[FlatSlice]
    active: Callable[[], list[Tensor]]
    norm: Callable[[], float | None]
    left: Left
    shares_replicas: bool = True

    def call(self) -> Sequence[int]:
        refuse_unfrozen(self.left)
        flats = {id(flat) for flat in self.active()}
        return [i for i, place in enumerate(self.places) if id(place.flat()) in flats]

    def complete_gradients(self, ranks: Ranks) -> None:
        """They are complete."""

    def moves_elsewhere(self) -> bool:
        norm = self.norm()
        return norm is None or norm != 0.0

    def part(self, i: int) -> LocalShard:
        place = self.places[i]
        return Interval(place.start, place.start + place.numel)

    def param(self, i: int) -> Tensor:
        return self.places[i].flat()

    def frozen(self, i: int) -> bool:
        return not self.places[i].source.requires_grad

    def options(self, i: int) -> Group:
        return self.groups[self.originals[i].group]

    def tensors(self, i: int) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        place = self.places[i]
        flat, frozen = place.flat(), self.frozen(i)
        # What DeepSpeed hands over for a frozen one are zeros, or the gradient of an earlier step.
        grad = None if frozen or flat.grad is None else _slice(place, flat.grad)
        return flat, _slice(place, flat), grad, frozen


def storage_under_deepspeed(
    originals: Sequence[ParamSpec],
    sources: Sequence[Tensor | None],
    groups: Sequence[Group],
    active: Callable[[], list[Tensor]],
    optimizer: object,
) -> tuple[Any, Sequence[ParamSpec], Storage] | None:
    """(process group, trainable originals, storage), or None if DeepSpeed does not hold these parameters.

    ``sources`` are the model's own parameters, as given to the optimizer. Raises ValueError for what is not supported.
    """
    engine = deepspeed_engine_of(optimizer)
    if engine is not None:
        check_supported(engine)
    elif not any(source is not None and _belongs(source) for source in sources):
        return None
    present = [source for source in sources if source is not None]
    if len(present) != len(sources):
        raise ValueError(
            "The model's parameters were replaced after the optimizer was built; build it after the model."
        )
    wrapper = None if engine is None else engine.optimizer
    if any(hasattr(source, "_z3_optimizer") for source in present):
        return _zero3(originals, present, groups, active, wrapper)
    if any(hasattr(source, "_hp_mapping") for source in present):
        return _zero12(originals, present, groups, active, wrapper)
    return _stage0(originals, present, groups, wrapper)


def refuse_unfrozen(left: Left) -> None:
    """ValueError if a parameter that DeepSpeed left out is trainable now. The program decides that, on all ranks."""
    names = [original.name for original, source in left if source.requires_grad]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(
            f"{names[0]}{more} was frozen (requires_grad=False) when deepspeed.initialize was called and is trainable "
            "now. DeepSpeed computes no gradient for it, so it would never move. Let it be trainable when you call "
            "deepspeed.initialize and freeze it afterwards (freezing and unfreezing then act as on one process), or "
            'save with frugal_dist.checkpoint, unfreeze, build a new engine and load with on_mismatch="refresh".'
        )


def _zero3(originals: Sequence[ParamSpec], sources: Sequence[Tensor], groups: Sequence[Group],
           active: Callable[[], list[Tensor]], wrapper: Any) -> tuple[Any, Sequence[ParamSpec], Storage]:  # fmt: skip
    zero: Any = next(source for source in sources if hasattr(source, "_z3_optimizer"))._z3_optimizer
    kept, left = _parted(originals, sources, lambda source: zero.get_param_id(source) in zero.grad_position)
    _check_one_family([cast("Any", source).ds_process_group for _, source in kept] + [zero.dp_process_group])
    storage = ZeroStorage(
        [original for original, _ in kept],
        groups,
        [_zero3_place(zero, source) for _, source in kept],
        active,
        _norm_of(wrapper),
        left,
    )
    return _checked(zero.dp_process_group, storage)


def _parted(
    originals: Sequence[ParamSpec], sources: Sequence[Tensor], is_kept: Callable[[Any], bool]
) -> tuple[Left, Left]:
    """The parameters that DeepSpeed optimizes, and those that it left out: they were frozen when it was built."""
    pairs = list(zip(originals, sources, strict=True))
    return [pair for pair in pairs if is_kept(pair[1])], [pair for pair in pairs if not is_kept(pair[1])]


def _norm_of(wrapper: Any) -> Callable[[], float | None]:
    """DeepSpeed computes it, over all ranks, before it calls step() for the first group or sub-group."""

    def norm() -> float | None:
        value = getattr(wrapper, "_global_grad_norm", None)
        return None if value is None else float(value)

    return norm


def _zero3_place(zero: Any, source: Any) -> FlatSlice:
    subgroup, offset, share = zero.grad_position[zero.get_param_id(source)]
    start = dist.get_rank(zero.dp_process_group) * share
    numel = max(0, min(share, source.ds_numel - start))
    return FlatSlice(
        start=min(start, source.ds_numel),
        numel=numel,
        offset=offset,
        flat=lambda: zero.fp32_partitioned_groups_flat[subgroup],
        low=lambda: source.ds_tensor.flatten()[:numel] if source.ds_tensor.numel() >= numel else None,
        source=source,
    )


def _zero12(originals: Sequence[ParamSpec], sources: Sequence[Tensor], groups: Sequence[Group],
            active: Callable[[], list[Tensor]], wrapper: Any) -> tuple[Any, Sequence[ParamSpec], Storage]:  # fmt: skip
    kept, left = _parted(originals, sources, lambda source: hasattr(source, "_hp_mapping"))
    process_groups: list[Any] = [getattr(source, "_dp_group", None) for _, source in kept]
    _check_one_family(process_groups)
    storage = ZeroStorage(
        [original for original, _ in kept],
        groups,
        [_zero12_place(groups[original.group], source) for original, source in kept],
        active,
        _norm_of(wrapper),
        left,
    )
    return _checked(process_groups[0], storage)


def _check_one_family(process_groups: Sequence[Any]) -> None:
    """ValueError unless all parameters are spread over the same ranks."""
    if len({tuple(dist.get_process_group_ranks(group)) for group in process_groups}) != 1:
        raise ValueError(
            "The parameters belong to several data-parallel groups (DeepSpeed MoE with expert parallelism), which "
            "Frugal does not support. Set the expert-parallel size to 1."
        )


def _zero12_place(group: Group, source: Any) -> FlatSlice:
    mapping = source._hp_mapping
    if mapping is None:  # nothing of it on this rank
        return FlatSlice(0, 0, 0, lambda: _flat_of(group), lambda: None, source)
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return FlatSlice(
        start=here.start,
        numel=here.numel,
        offset=there.start,
        flat=lambda: _flat_of(group),
        low=lambda: source.detach().flatten()[here.start : here.start + here.numel],
        source=source,
    )


def _flat_of(group: Group) -> Tensor:
    flat: Tensor = group["params"][0]
    return flat


def _stage0(
    originals: Sequence[ParamSpec], sources: Sequence[Tensor], groups: Sequence[Group], wrapper: Any
) -> tuple[Any, Sequence[ParamSpec], Storage]:
    """No ZeRO: the parameters themselves (fp32), or fp32 clones of the trainable ones, in order (bf16)."""
    from deepspeed.utils import groups as deepspeed_groups

    process_group = deepspeed_groups._get_data_parallel_group()
    held = [tensor for group in groups for tensor in group["params"]]
    if {id(tensor) for tensor in held} <= {id(source) for source in sources}:
        return process_group, originals, PlainStorage(groups, originals, shares_replicas=False)
    if any(source.dtype == torch.float16 for source in sources):
        raise ValueError(
            "DeepSpeed stage 0 with fp16 divides the gradients by the loss scale once too often (seen in 0.19). Use "
            '"zero_optimization": {"stage": 1} or bf16.'
        )
    cloned = _cloned(sources, wrapper)
    kept, left = _parted(originals, sources, lambda source: id(source) in cloned)
    counts, placed = [0] * len(groups), []
    for original, _ in kept:
        placed.append(replace(original, position=counts[original.group]))
        counts[original.group] += 1
    if counts != [len(group["params"]) for group in groups]:
        raise ValueError(
            "DeepSpeed's fp32 copies do not match the trainable parameters one to one; nothing was updated."
        )
    models = [source for _, source in kept]
    check = functools.partial(refuse_unfrozen, left)
    return process_group, placed, PlainStorage(groups, placed, shares_replicas=False, models=models, check=check)


def _cloned(sources: Sequence[Tensor], wrapper: Any) -> set[int]:
    """The ids of the parameters of which DeepSpeed has clones: those that were trainable when it was built."""
    groups = getattr(wrapper, "fp16_groups", None)
    if groups is None:  # it is being built
        return {id(source) for source in sources if source.requires_grad}
    return {id(param) for group in groups for param in group}


# --- around portable checkpoints --------------------------------------------------------------------------------------


def stored_part(tensor: Tensor) -> tuple[LocalShard, Tensor]:
    """Which part of a parameter that is not optimized lies here, and its memory: all of it, or ZeRO-3's partition."""
    partition = getattr(tensor, "ds_tensor", None)
    if partition is None:
        return Box(tuple((0, size) for size in tensor.shape)), tensor.detach()
    whole: int = cast("Any", tensor).ds_numel
    share = partition.numel()
    start = min(dist.get_rank(cast("Any", tensor).ds_process_group) * share, whole)
    numel = min(share, whole - start)
    return Interval(start, start + numel), partition.detach().flatten()[:numel]


# --- trust, but verify --------------------------------------------------------------------------------------------


def _checked(process_group: Any, storage: ZeroStorage) -> tuple[Any, Sequence[ParamSpec], Storage]:
    """Compare every mapped piece with the model's weights: a wrong mapping would train garbage in silence."""
    for i, (original, place) in enumerate(zip(storage.originals, storage.places, strict=True)):
        flat = place.flat()
        if flat.dtype != torch.float32:
            raise ValueError(
                f"DeepSpeed keeps {flat.dtype} master weights. Frugal needs fp32 ones: remove "
                "bf16_master_weights_and_grads / fp16_master_weights_and_grads from the config."
            )
        low, high = place.low(), storage.tensors(i)[1]
        if low is not None and not torch.equal(high.to(low.device, low.dtype), low):
            raise ValueError(
                f"{original.name}: elements {place.start} to {place.start + place.numel} are not where DeepSpeed says "
                "they are in its flat partition. This combination of options is not supported (round_robin_gradients "
                "is known to cause it: set it to false); nothing was updated."
            )
    return process_group, storage.originals, storage


def _slice(place: FlatSlice, flat: Tensor) -> Tensor:
    return flat[place.offset : place.offset + place.numel]
