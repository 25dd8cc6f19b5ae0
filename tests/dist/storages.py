"""Ways to store the same parameters on several ranks, for tests: replicas, DTensors, flat partitions as ZeRO's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from frugal_dist import Frugal, engines
from frugal_dist.sharding.shard import Box, Interval, LocalShard, ParamSpec

Named = dict[str, Tensor]
Groups = set[str] | Sequence[dict[str, Any]]
"""The names that are projected, or parameter groups whose "params" are names."""


@dataclass
class Held:
    """Parameters as one rank holds them. ``step(grads)`` makes one optimizer step with the whole gradients."""

    optimizer: Frugal
    step: Callable[[Named], None]
    full: Callable[[], Named]


def groups_of(named: dict[str, nn.Parameter], groups: Groups) -> list[dict[str, Any]]:
    if isinstance(groups, set):
        parts = [(wanted, [n for n in named if (n in groups) is wanted]) for wanted in (True, False)]
        groups = [{"params": names, "projected": wanted} for wanted, names in parts if names]
    return [{**group, "params": [(name, named[name]) for name in group["params"]]} for group in groups]


def _set_grads(named: dict[str, nn.Parameter], grads: Named, place: Callable[[Tensor, nn.Parameter], Tensor]) -> None:
    for name, param in named.items():
        grad = grads.get(name)
        param.grad = None if grad is None else place(grad, param)


def replicas(weights: Named, groups: Groups, options: dict[str, Any]) -> Held:
    """Every rank holds everything: DDP, or one process."""
    named = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
    optimizer = Frugal(groups_of(named, groups), **options)

    def step(grads: Named) -> None:
        _set_grads(named, grads, lambda grad, param: grad.to(param.dtype).clone())
        optimizer.step()

    return Held(optimizer, step, lambda: {name: param.detach().clone() for name, param in named.items()})


def dtensors(
    weights: Named, groups: Groups, options: dict[str, Any], shape: Sequence[int], placements: Sequence[Placement]
) -> Held:
    """DTensors over a mesh of ``shape``: FSDP2 Shard(0) or Shard(1), HSDP. Vectors are sharded on dim 0."""
    mesh = init_device_mesh(next(iter(weights.values())).device.type, tuple(shape))

    def put(tensor: Tensor) -> DTensor:
        places = [Shard(min(p.dim, tensor.dim() - 1)) if isinstance(p, Shard) else p for p in placements]
        return _cut(tensor, mesh, places)

    named = {name: nn.Parameter(put(weight)) for name, weight in weights.items()}
    optimizer = Frugal(groups_of(named, groups), **options)

    def step(grads: Named) -> None:
        _set_grads(named, grads, cut_like)
        optimizer.step()

    return Held(optimizer, step, lambda: _whole(named, weights))


def cut_like(whole: Tensor, param: Tensor) -> DTensor:
    """This rank's part of ``whole``, as a DTensor placed as ``param`` is; no communication."""
    assert isinstance(param, DTensor)
    return _cut(whole.to(param.dtype), param.device_mesh, param.placements)


def _cut(whole: Tensor, mesh: DeviceMesh, places: Sequence[Placement]) -> DTensor:
    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, places)
    local = whole[_slices(shape, offset)].clone()
    return DTensor.from_local(local, mesh, places, run_check=False, shape=whole.shape, stride=whole.stride())


def _slices(shape: Sequence[int], offset: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def _whole(named: dict[str, nn.Parameter], like: Named) -> Named:
    """Every rank's parts put together; replicas must agree bit for bit."""
    mine = []
    for name, param in named.items():
        data = param.detach()
        assert isinstance(data, DTensor)
        at = _slices(*compute_local_shape_and_global_offset(data.shape, data.device_mesh, data.placements))
        mine.append((name, at, data.to_local()))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {name: torch.full_like(tensor, float("nan")) for name, tensor in like.items()}
    for name, at, piece in (entry for pieces in everyone for entry in pieces):
        target = found[name][at]
        same = target.isnan().all() or torch.allclose(target, piece, rtol=0, atol=0, equal_nan=True)
        assert same, f"replicas of {name} differ"
        target.copy_(piece)
    return found


class FlatStorage:
    """ZeRO's flat partitions, simulated: each sub-group's parameters are concatenated (or cut one by one) and sliced.

    The optimizer's groups hold one flat tensor per sub-group; ``current`` is the sub-group that steps now.
    """

    shares_replicas = True

    def __init__(self, originals: Sequence[ParamSpec], weights: Named, subgroups: int, each: bool) -> None:
        self.originals, self.each = originals, each
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.members: list[list[int]] = [list(range(len(originals)))[k::subgroups] for k in range(subgroups)]
        self.parts: dict[int, tuple[int, Interval, int]] = {}
        self.flats = [nn.Parameter(self._cut(k, weights)) for k in range(subgroups)]
        self.current = 0
        self.grads: list[Tensor] = []
        self.options_of: Callable[[int], dict[str, Any]] = lambda i: {}

    def _spans(self, members: Sequence[int]) -> list[tuple[int, int, int]]:
        """(parameter, start, stop) of what this rank holds, in flat order."""
        sizes = {i: torch.Size(self.originals[i].shape).numel() for i in members}
        found, base, total = [], 0, sum(sizes.values())
        share = -(-total // self.size)
        for i in members:
            chunk = -(-sizes[i] // self.size)
            start, stop = (self.rank * chunk, (self.rank + 1) * chunk) if self.each else (0, sizes[i])
            if not self.each:
                start, stop = self.rank * share - base, (self.rank + 1) * share - base
            base += sizes[i]
            start, stop = max(start, 0), min(stop, sizes[i])
            found.append((i, min(start, max(stop, 0)), max(stop, 0)))
        return found

    def _cut(self, k: int, weights: Named) -> Tensor:
        pieces, offset = [], 0
        for i, start, stop in self._spans(self.members[k]):
            self.parts[i] = (k, Interval(start, stop), offset)
            pieces.append(weights[self.originals[i].name].reshape(-1)[start:stop])
            offset += stop - start
        padding = torch.zeros(3, dtype=pieces[0].dtype, device=pieces[0].device)
        return torch.cat([*pieces, padding])

    def call(self) -> Sequence[int]:
        return self.members[self.current]

    def complete_gradients(self, ranks: Any) -> None:
        """They are complete."""

    def moves_elsewhere(self) -> bool:
        return any(bool(grad.any()) for grad in self.grads)

    def frozen(self, i: int) -> bool:
        return False

    def part(self, i: int) -> LocalShard:
        return self.parts[i][1]

    def param(self, i: int) -> Tensor:
        return self.flats[self.parts[i][0]]

    def options(self, i: int) -> dict[str, Any]:
        return self.options_of(i)

    def _slice(self, i: int, flat: Tensor) -> Tensor:
        _, part, offset = self.parts[i]
        return flat[offset : offset + part.stop - part.start]

    def tensors(self, i: int) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        flat = self.param(i)
        grad = None if flat.grad is None else self._slice(i, flat.grad)
        return flat, self._slice(i, flat.detach()), grad, False


def flats(weights: Named, groups: Groups, options: dict[str, Any], subgroups: int, each: bool) -> Held:
    """Flat partitions: ``each`` False as ZeRO-1/2 (all concatenated), True as ZeRO-3 (every parameter cut)."""
    engines._choose = choose_with_simulation  # passes everything else through, so it may stay
    named = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
    optimizer = Frugal(groups_of(named, groups), **options)
    storage = FlatStorage(optimizer._originals, weights, subgroups, each)
    storage.options_of = lambda i: optimizer.param_groups[storage.originals[i].group]
    SIMULATED[id(optimizer._originals)] = storage
    weakref.finalize(optimizer, SIMULATED.pop, id(optimizer._originals))
    for k, group in enumerate(optimizer.param_groups):
        group["params"] = storage.flats if k == 0 else []

    def step(grads: Named) -> None:
        storage.grads = list(grads.values())
        for k in range(subgroups):
            gradients = {storage.originals[i].name: grads[storage.originals[i].name] for i in storage.members[k]}
            storage.flats[k].grad = _flat_grad(storage, k, gradients)
            storage.current = k
            optimizer.step()

    return Held(optimizer, step, lambda: _gather(storage))


def _flat_grad(storage: FlatStorage, k: int, grads: Named) -> Tensor:
    grad = torch.zeros_like(storage.flats[k])
    for i in storage.members[k]:
        _, part, offset = storage.parts[i]
        piece = grads[storage.originals[i].name].reshape(-1)[part.start : part.stop]
        grad[offset : offset + piece.numel()] = piece
    return grad


def _gather(storage: FlatStorage) -> Named:
    mine = [(i, part.start, storage.tensors(i)[1].clone()) for i, (_, part, _) in storage.parts.items()]
    everyone: list[Any] = [None] * storage.size
    dist.all_gather_object(everyone, mine)
    found = {o.name: torch.full(o.shape, float("nan"), dtype=storage.flats[0].dtype) for o in storage.originals}
    for pieces in everyone:
        for i, start, piece in pieces:
            found[storage.originals[i].name].view(-1)[start : start + piece.numel()] = piece
    return found


_choose = engines._choose
SIMULATED: dict[int, Any] = {}


def choose_with_simulation(request: Any, ranks: Any) -> Any:
    """engines._choose, but an optimizer that carries a simulated storage gets that."""
    simulated = SIMULATED.get(id(request.originals))
    return _choose(request, ranks) if simulated is None else (ranks, request.originals, simulated)


__all__ = ["Box", "Held", "Replicate", "Shard", "choose_with_simulation", "dtensors", "flats", "groups_of", "replicas"]
