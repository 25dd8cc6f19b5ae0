"""Which engine holds the parameters: asked once, at the first step. The only place that chooses a storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from frugal_dist.config import HYPERPARAMETERS, python_value
from frugal_dist.engines import accelerate, deepspeed, hooks, zero
from frugal_dist.engines.plain import PlainStorage
from frugal_dist.sharding.collectives import Ranks, is_initialized, ranks_of
from frugal_dist.sharding.shard import LocalShard, ParamSpec, Storage
from frugal_dist.sharding.table import build_table
from frugal_dist.step.runtime import Runtime
from frugal_dist.update.kernels import kind_for
from frugal_dist.update.rules import STATE_FULL


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape in the user's model, whatever part of it is here."""
    return deepspeed.full_shape(tensor)


def names_of(tensors: Sequence[Tensor]) -> list[str | None]:
    """The names under which an engine knows these parameters; None where it does not."""
    return deepspeed.names_of(tensors)


def announce(optimizer: Optimizer, process_group: Any) -> None:
    """Make the optimizer known to engines that keep a list of those they trust, and to those it cannot work with."""
    deepspeed.announce(type(optimizer))
    hooks.watch_joins(optimizer, process_group)


def cuts_groups_evenly() -> bool:
    """Whether the engine that is building the optimizer gives each rank an equal part of every parameter group."""
    return hooks.deepspeed_engine_in_construction() is not None


def refuse_replacement() -> None:
    """ValueError if a launcher is about to put another optimizer in the place of this one."""
    accelerate.refuse_replacement()


def replaces_given_optimizers() -> bool:
    """Whether the Trainer would drop a finished optimizer: it does so under DeepSpeed."""
    return accelerate.drives_deepspeed()


def is_driven(optimizer: object) -> bool:
    """Whether the user's script leaves the training to DeepSpeed, Accelerate or the Trainer."""
    return accelerate.in_use() or hooks.deepspeed_engine_of(optimizer) is not None


def reads_json() -> bool:
    """Whether an engine is building the optimizer from its config, which has numbers, words and lists only."""
    return deepspeed.json_options() is not None


def unheard_wishes(given: Mapping[str, Any]) -> str:
    """What to say about arguments of the Trainer or of DummyOptim that do not count, since the JSON leaves them out."""
    options = deepspeed.json_options()
    if options is None:
        return ""
    where, wishes = hooks.wishes()
    keys = [key for key in wishes if key not in options and wishes[key] != given[key]]
    if not STATE_FULL[given["state_full"]].is_adamw:
        keys = [key for key in keys if key in ("lr", "weight_decay")]
    if not keys:
        return ""
    said = ", ".join(f"{key}={given[key]} and not {wishes[key]}" for key in keys)
    auto = ", ".join(f'"{key}": "auto"' for key in keys)
    return (
        f"The optimizer in DeepSpeed's config leaves out {', '.join(keys)}, so Frugal has its defaults: {said}, as "
        f"{where} says. Write {auto} to take that over, or the value that is meant."
    )


def refuse_to_be_given_a_part() -> None:
    """ValueError if a wrapper is building one optimizer per rank, each for some of the parameters."""
    hooks.refuse_zero_redundancy()


def keeps_rank_zero_only(optimizer: object) -> bool:
    """Whether a trainer's checkpoints keep no other rank's ``state_dict`` of ``optimizer`` than rank 0's."""
    return accelerate.keeps_rank_zero_only() or hooks.lightning_keeps_rank_zero_only(optimizer)


def driver_of(optimizer: object, model_or_engine: Any) -> Any:
    """What ``frugal_dist.checkpoint`` has to be given: the engine that drives ``optimizer``, otherwise the model."""
    return hooks.deepspeed_engine_of(optimizer) or model_or_engine


def group_of(model_or_engine: Any) -> Any:
    """The ranks that load and save together: an engine's, otherwise all, as ``ranks_of`` takes them."""
    return deepspeed.group_of(model_or_engine) or "auto"


def layout_of(model_or_engine: Any, optimizer: Optimizer) -> str:
    """In words, what has to be the same for an engine to load its own checkpoint, beside the number of ranks."""
    words = deepspeed.layout_of(model_or_engine)
    if not words and is_sharded(optimizer):
        from frugal_dist.engines import dtensor

        words = dtensor.layout_of([tensor for group in optimizer.param_groups for tensor in group["params"]])
    return words or "plain tensors"


def is_written_by_rank_zero(name: str) -> bool:
    """Whether a file of this name in a checkpoint of an engine or trainer is rank 0's, and changes with the weights."""
    return any(kind.fullmatch(name) for kind in (deepspeed.OWN_FILE, hooks.DCP_FILE, accelerate.OWN_FILE))


def is_sharded(optimizer: Optimizer) -> bool:
    """Whether it has DTensors: FSDP2, tensor parallelism."""
    return any(hasattr(tensor, "device_mesh") for group in optimizer.param_groups for tensor in group["params"])


def is_slice(optimizer: Optimizer, ranks: Ranks) -> bool:
    """Whether its DTensors live on a part of a larger mesh, whose other ranks may hold other layers."""
    if not is_sharded(optimizer):
        return False
    from frugal_dist.engines import dtensor

    return dtensor.is_slice([tensor for group in optimizer.param_groups for tensor in group["params"]], ranks.size)


def counts_of(model_or_engine: Any) -> dict[str, Any]:
    """An engine's own counts (steps, schedule, loss scale), to be saved with the weights."""
    return deepspeed.counts_of(model_or_engine)


def after_loading(model_or_engine: Any, counts: dict[str, Any]) -> None:
    """Bring an engine in line with new master weights: its low-precision copies and its counts."""
    deepspeed.after_loading(model_or_engine, counts)


def stored_part(name: str, tensor: Tensor) -> tuple[tuple[int, ...], LocalShard, Tensor]:
    """A parameter that is not optimized: its whole shape, which part of it is here, and that part's memory."""
    if hasattr(tensor, "device_mesh"):
        from frugal_dist.engines import dtensor

        return tuple(tensor.shape), *dtensor.stored_part(name, tensor)
    return full_shape(tensor), *zero.stored_part(tensor)


def is_settled(process_group: Any) -> bool:
    """Whether parameters stay as they are until the next step. Engines move them, also on one rank."""
    return process_group is None or not is_initialized()


@dataclass(frozen=True)
class Request:
    """What the optimizer knows: its parameters as given, its groups, and what the user asked for."""

    optimizer: object
    originals: Sequence[ParamSpec]
    sources: Sequence[Tensor | None]
    groups: Sequence[dict[str, Any]]
    active: Callable[[], list[Tensor]]
    process_group: Any
    shard_state: bool | str
    bucket_bytes: int
    whole: Sequence[ParamSpec] = ()
    """All parameters of the model, where the optimizer has those of a pipeline stage."""
    before: Runtime | None = None
    problem: str = ""
    """What this rank cannot go on with: all are to hear of it."""


def bind(request: Request) -> Runtime:
    """Choose the storage, exchange and verify the table. Collective. Raises ValueError on all ranks alike.

    The matrices of ``before`` keep their owners and routes: their state lies there.
    """
    ranks, originals, problem = ranks_of(request.process_group), request.originals, ""
    settings: dict[str, object] = {}
    try:
        ranks, originals, storage = _choose(request, ranks)
        settings = {**_settings(request), **_kernels(originals, storage), **_sharing(request, storage)}
    except ValueError as error:  # all ranks must hear of it before any of them raises
        storage, problem = PlainStorage(request.groups, originals), str(error)
    problem = request.problem or problem
    owners = [] if request.before is None else [matrix.owner for matrix in request.before.table.matrices]
    table = build_table(ranks, originals, request.whole or request.originals, storage, settings, problem, owners)
    share = _shares(request, storage) and not ranks.alone
    runtime = Runtime(ranks, storage, originals, table, share, request.bucket_bytes)
    if request.before is not None:
        runtime.routes.update(request.before.routes)
    return runtime


def _settings(request: Request) -> dict[str, object]:
    """What must be equal on all ranks, by the name under which a difference is reported."""
    one = len(request.groups) == 1
    settings: dict[str, object] = {"shard_state": request.shard_state}
    for number, group in enumerate(request.groups):
        where = "" if one else f" of group {number}"
        settings.update({key + where: python_value(group.get(key)) for key in HYPERPARAMETERS})
    return settings


def _shares(request: Request, storage: Storage) -> bool:
    return request.shard_state if isinstance(request.shard_state, bool) else storage.shares_replicas


def _sharing(request: Request, storage: Storage) -> dict[str, object]:
    """What "auto" comes to depends on the trainer in charge: one that only some ranks use must not divide them."""
    return {"shared state (shard_state=True or False says so on all ranks)": _shares(request, storage)}


def _kernels(originals: Sequence[ParamSpec], storage: Storage) -> dict[str, object]:
    """Replicas that step with other kernels drift apart in their last bits."""
    return {"kernels (FRUGAL_KERNELS=torch makes them equal)": kind_for(storage.param(0))} if originals else {}


def _choose(request: Request, ranks: Ranks) -> tuple[Ranks, Sequence[ParamSpec], Storage]:
    held = [tensor for group in request.groups for tensor in group["params"]]
    under_zero = zero.storage_under_deepspeed(
        request.originals, request.sources, request.groups, request.active, request.optimizer
    )
    if under_zero is not None:
        process_group, originals, storage = under_zero
        auto = isinstance(request.process_group, str)
        if (
            request.process_group is None
            and not ranks_of(process_group).alone
            and not isinstance(storage, PlainStorage)
        ):
            raise ValueError(
                "ZeRO spreads the parameters over ranks, but process_group=None says this process is alone. Remove it."
            )
        return ranks_of(process_group if auto else request.process_group), originals, storage
    refuse_fsdp1(held)
    if any(hasattr(tensor, "device_mesh") for tensor in held):
        return _dtensor(request, held)
    shares = not keeps_rank_zero_only(request.optimizer)
    return ranks, request.originals, PlainStorage(request.groups, request.originals, shares_replicas=shares)


def _dtensor(request: Request, held: Sequence[Tensor]) -> tuple[Ranks, Sequence[ParamSpec], Storage]:
    from frugal_dist.engines import dtensor  # torch.distributed.tensor is slow to import: only where it is used

    if request.process_group is None:
        raise ValueError(
            "The parameters are DTensors, sharded over ranks, but process_group=None says this process is alone."
        )
    group = dtensor.mesh_group(held) if isinstance(request.process_group, str) else request.process_group
    ranks, storage = ranks_of(group), dtensor.DTensorStorage(request.groups, request.originals)
    if not request.whole and dtensor.is_slice(held, ranks.size):
        refuse_unknown_blocks(request.groups)
    return ranks, request.originals, storage


def refuse_unknown_blocks(groups: Sequence[dict[str, Any]]) -> None:
    """ValueError where matrices are counted, and other ranks may hold more of them."""
    for group in groups:
        for key, word in (("projection", "blockwise"), ("refresh_schedule", "staggered")):
            if group.get(key) == word:
                raise ValueError(
                    f"{key}={word!r} counts the matrices of the whole model, but these parameters live on a part of a "
                    "larger mesh, whose other ranks may hold other layers, as pipeline stages do. Give "
                    "whole_model=split_parameters(model) of the model before it was split (the meta device will do), "
                    "or of this one if it is whole."
                )


def refuse_fsdp1(tensors: Sequence[Tensor]) -> None:
    """ValueError for parameters of FSDP1, which flattens matrices and keeps no map of them."""
    for tensor in tensors:
        if (
            type(tensor).__name__ == "FlatParameter"
            or hasattr(tensor, "_fsdp_flattened")
            or hasattr(tensor, "_is_flat_param")
        ):
            raise ValueError(
                "The parameters belong to FSDP1 (FullyShardedDataParallel), which flattens matrices. Use FSDP2: "
                "torch.distributed.fsdp.fully_shard(model)."
            )
