"""Which engine holds the parameters: asked once, at the first step. The only place that chooses a storage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from frugal_dist.config import HYPERPARAMETERS
from frugal_dist.sharding import zero
from frugal_dist.sharding.exchange import ALONE, Ranks, ranks_of
from frugal_dist.sharding.plain import PlainStorage
from frugal_dist.sharding.storage import Original, Storage
from frugal_dist.sharding.table import build_table
from frugal_dist.work import Runtime


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape in the user's model, whatever part of it is here."""
    return zero.full_shape(tensor)


def name_of(tensor: Tensor) -> str | None:
    """The name under which an engine knows an unnamed parameter, if any does."""
    return zero.name_of(tensor)


def is_alone(process_group: Any) -> bool:
    """Whether no collective will ever be needed."""
    return ranks_of(process_group).alone


def bind(
    optimizer: Optimizer,
    originals: Sequence[Original],
    process_group: Any,
    shard_state: bool | str,
    bucket_bytes: int,
) -> Runtime:
    """Choose the storage, exchange and verify the table. Collective. Raises ValueError on all ranks alike."""
    ranks = ranks_of(process_group)
    problem = ""
    try:
        ranks, storage = _choose(optimizer, originals, process_group, ranks)
    except ValueError as error:  # all ranks must hear of it before any of them raises
        storage, problem = PlainStorage(optimizer.param_groups, originals), str(error)
    options = [{key: group.get(key) for key in HYPERPARAMETERS} for group in optimizer.param_groups]
    table = build_table(ranks, originals, storage, (options, shard_state), problem)
    share = shard_state if isinstance(shard_state, bool) else storage.shares_replicas
    return Runtime(ranks, storage, originals, table, share and not ranks.alone, bucket_bytes)


def _choose(
    optimizer: Optimizer, originals: Sequence[Original], process_group: Any, ranks: Ranks
) -> tuple[Ranks, Storage]:
    groups = optimizer.param_groups
    tensors = [tensor for group in groups for tensor in group["params"]]
    _refuse_fsdp1(tensors)
    if any(type(tensor).__name__ == "DTensor" or hasattr(tensor, "device_mesh") for tensor in tensors):
        return _dtensor(groups, originals, tensors, process_group)
    return ranks, PlainStorage(groups, originals)


def _dtensor(
    groups: Sequence[dict[str, Any]], originals: Sequence[Original], tensors: Sequence[Tensor], process_group: Any
) -> tuple[Ranks, Storage]:
    from frugal_dist.sharding import dtensor  # torch.distributed.tensor is slow to import: only where it is used

    if process_group is None:
        raise ValueError(
            "The parameters are DTensors, sharded over ranks, but process_group=None says this process is alone."
        )
    group = dtensor.mesh_group(tensors) if isinstance(process_group, str) else process_group
    ranks = ranks_of(group)
    return (ALONE if ranks.size == 1 else ranks), dtensor.DTensorStorage(groups, originals)


def _refuse_fsdp1(tensors: Sequence[Tensor]) -> None:
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
