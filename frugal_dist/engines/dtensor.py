"""Storage of DTensors: FSDP2 on any dim, HSDP. The only user of torch's DTensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from frugal_dist.sharding.shard import Box, LocalShard, ParamSpec


@dataclass(frozen=True)
class DTensorStorage:
    """Parameters of ``fully_shard``: local shards, and ordinary tensors that were left out of it as replicas."""

    groups: Sequence[dict[str, Any]]
    originals: Sequence[ParamSpec]
    shares_replicas: bool = True
    parts: dict[int, LocalShard] = field(default_factory=dict)

    def call(self) -> Sequence[int]:
        return range(len(self.originals))

    def moves_elsewhere(self) -> bool:
        return False

    def part(self, i: int) -> LocalShard:
        if i not in self.parts:
            param, original = self.param(i), self.originals[i]
            whole = tuple((0, size) for size in original.shape)
            self.parts[i] = Box(_spans(original.name, param) if isinstance(param, DTensor) else whole)
        return self.parts[i]

    def param(self, i: int) -> Tensor:
        original = self.originals[i]
        param: Tensor = self.groups[original.group]["params"][original.position]
        return param

    def frozen(self, i: int) -> bool:
        return not self.param(i).requires_grad

    def options(self, i: int) -> dict[str, Any]:
        return self.groups[self.originals[i].group]

    def tensors(self, i: int) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        param = self.param(i)
        grad = param.grad
        if isinstance(grad, DTensor) and isinstance(param, DTensor):
            _check_gradient(self.originals[i].name, param, grad)
        return param, _local(param), None if grad is None else _local(grad), not param.requires_grad


def stored_part(name: str, tensor: Tensor) -> tuple[LocalShard, Tensor]:
    """Which part of a DTensor this rank holds, and its memory."""
    assert isinstance(tensor, DTensor)
    return Box(_spans(name, tensor)), _local(tensor)


def mesh_group(tensors: Sequence[Tensor]) -> Any:
    """The process group of all ranks that share these DTensors; ValueError if they live on different meshes."""
    meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
    if len(meshes) != 1:
        raise ValueError(
            f"The DTensor parameters live on {len(meshes)} different device meshes. Frugal needs one: shard all "
            "projected parameters over the same mesh (expert or pipeline parallelism is not supported)."
        )
    mesh = meshes.pop()
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return mesh._flatten().get_group()


def _check_gradient(name: str, param: DTensor, grad: DTensor) -> None:
    """A Partial gradient is not added up yet: torch's SequenceParallel leaves that to the optimizer."""
    if grad.placements != param.placements:
        raise ValueError(
            f"{name}: its gradient has placements {tuple(grad.placements)}, the parameter {tuple(param.placements)}. "
            "Frugal needs them equal, as under FSDP2 and HSDP; sequence parallelism and other tensor parallelism that "
            "leaves sums to the optimizer are not supported."
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _spans(name: str, tensor: DTensor) -> tuple[tuple[int, int], ...]:
    """The half-open range of each dim that this rank holds. Checks the placements: one Shard, else Replicate."""
    placements = tensor.placements
    shards = [(axis, p) for axis, p in enumerate(placements) if type(p) is Shard]
    if len(shards) > 1 or any(type(p) not in (Shard, Replicate) for p in placements):
        raise ValueError(
            f"{name}: placements {tuple(placements)} are not supported. Frugal knows FSDP2 (Shard on one mesh axis) "
            "and HSDP (Replicate x Shard); tensor parallelism, _StridedShard and Partial are not."
        )
    spans = [(0, size) for size in tensor.shape]
    for axis, placement in shards:
        length = tensor.shape[placement.dim]
        chunk = -(-length // tensor.device_mesh.size(axis))  # torch.chunk's rule: equal pieces, the last ones shorter
        start = min(chunk * tensor.device_mesh.get_local_rank(axis), length)
        spans[placement.dim] = (start, min(start + chunk, length))
    expected = tuple(stop - start for start, stop in spans)
    if tuple(tensor.to_local().shape) != expected:
        raise ValueError(
            f"{name}: this rank's shard is {tuple(tensor.to_local().shape)}, but {tuple(placements)} of "
            f"{tuple(tensor.shape)} should give {expected}. This torch version shards in a way Frugal does not know."
        )
    return tuple(spans)
