"""Storage of DTensors on any mesh: FSDP2, HSDP, tensor and expert parallelism. The only user of torch's DTensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement

from frugal_dist.sharding.collectives import Ranks, agree_max, gather_objects
from frugal_dist.sharding.shard import Box, Grid, LocalShard, ParamSpec, Span

_FROZEN, _ABSENT, _PLACED, _ELSEWHERE = 0, 1, 2, 3
"""What a rank says of a gradient: it has none, and the parameter is frozen or not; or one that is placed as its
parameter, or otherwise.
"""


@dataclass(frozen=True)
class DTensorStorage:
    """Local shards of DTensors on one or several meshes, and ordinary tensors beside them as replicas.

    ``unseen``: parameters that are replicated along some mesh axis and never had a gradient on any rank: it may come as
    addends (Partial), as sequence parallelism leaves it. ``addends``: those of which it does, with its placements.
    ``asleep``: of both those that were frozen and had no gradient on any rank when it was asked for: nobody asks again
    while they are frozen, which is a decision of the program, the same on all ranks. ``sums``: the gradients of this
    step that came as addends.
    """

    groups: Sequence[dict[str, Any]]
    originals: Sequence[ParamSpec]
    shares_replicas: bool = True
    parts: dict[int, LocalShard] = field(default_factory=dict)
    unseen: list[int] = field(default_factory=list)
    addends: dict[int, tuple[Placement, ...]] = field(default_factory=dict)
    asleep: set[int] = field(default_factory=set)
    sums: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unseen.extend(i for i in range(len(self.originals)) if _is_replicated(self.param(i)))

    def call(self) -> Sequence[int]:
        return range(len(self.originals))

    def complete_gradients(self, ranks: Ranks) -> None:
        self.sums.clear()
        self.asleep.intersection_update([i for i in self.asleep if self.frozen(i)])
        self._look(ranks, [i for i in self.unseen if i not in self.asleep])
        self._add_up(ranks, [i for i in sorted(self.addends) if i not in self.asleep])

    def _add_up(self, ranks: Ranks, known: Sequence[int]) -> None:
        """Sum what comes as addends, where any rank has some. A rank that has its own knows, and waits for nothing."""
        if not known:
            return
        if ranks.alone:
            here = [i for i in known if _arrival(self.param(i)) >= _PLACED]
            self.sums.update({i: _summed(self.originals[i].name, self.param(i), self.addends[i]) for i in here})
            return
        mine = [_arrival(self.param(i)) for i in known]
        device = ranks.device(_local(self.param(known[0])).device)
        lacks = min(mine) < _PLACED
        everyone = torch.tensor(mine, device=device) if lacks else torch.full((len(mine),), _ELSEWHERE, device=device)
        dist.all_reduce(everyone, op=dist.ReduceOp.MAX, group=ranks.group)
        for i, how in zip(known, everyone.tolist() if lacks else mine, strict=True):
            if how >= _PLACED:
                self.sums[i] = _summed(self.originals[i].name, self.param(i), self.addends[i])
            elif how == _FROZEN:
                self.asleep.add(i)

    def _look(self, ranks: Ranks, about: Sequence[int]) -> None:
        """Find out together whose gradients have come, and which of them are addends."""
        if not about:
            return
        seen = agree_max(ranks, [_arrival(self.param(i)) for i in about], _local(self.param(about[0])).device)
        self.asleep.update(i for i, how in zip(about, seen, strict=True) if how == _FROZEN)
        elsewhere = [i for i, how in zip(about, seen, strict=True) if how == _ELSEWHERE]
        if elsewhere:
            grads = {i: self.param(i).grad for i in elsewhere}
            mine = {i: grad.placements for i, grad in grads.items() if isinstance(grad, DTensor)}
            everyone = gather_objects(ranks, mine)
            self.addends.update({i: next(other[i] for other in everyone if i in other) for i in elsewhere})
        come = {i for i, how in zip(about, seen, strict=True) if how >= _PLACED}
        self.unseen[:] = [i for i in self.unseen if i not in come]

    def moves_elsewhere(self) -> bool:
        return False

    def part(self, i: int) -> LocalShard:
        if i not in self.parts:
            param, original = self.param(i), self.originals[i]
            whole = Box(tuple((0, size) for size in original.shape))
            self.parts[i] = _part(original.name, param) if isinstance(param, DTensor) else whole
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
        summed = (i in self.addends or i in self.unseen) and i not in self.asleep
        grad = self.sums.get(i) if summed else param.grad
        if isinstance(grad, DTensor) and isinstance(param, DTensor):
            _check_gradient(self.originals[i].name, param, grad)
        return param, _local(param), None if grad is None else _local(grad), not param.requires_grad


def stored_part(name: str, tensor: Tensor) -> tuple[LocalShard, Tensor]:
    """Which part of a DTensor this rank holds, and its memory."""
    assert isinstance(tensor, DTensor)
    return _part(name, tensor), _local(tensor)


def layout_of(tensors: Sequence[Tensor]) -> str:
    """How DTensors lie on their meshes, in words."""
    held = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    kinds = {f"{tuple(one.placements)} on a mesh of {tuple(one.device_mesh.shape)}" for one in held}
    return f"DTensors as {', '.join(sorted(kinds))}"


# --- gradients -------------------------------------------------------------------------------------------------------


def _is_replicated(param: Tensor) -> bool:
    """Along any mesh axis that has more than one rank."""
    if not isinstance(param, DTensor):
        return False
    return any(p.is_replicate() and param.device_mesh.size(axis) > 1 for axis, p in enumerate(param.placements))


def _arrival(param: Tensor) -> int:
    grad = param.grad
    if grad is None:
        return _ABSENT if param.requires_grad else _FROZEN
    elsewhere = isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements
    return _ELSEWHERE if elsewhere else _PLACED


def _summed(name: str, param: Tensor, placements: tuple[Placement, ...]) -> Tensor:
    """The gradient, placed as its parameter is; a rank that has none adds zeros."""
    assert isinstance(param, DTensor)
    grad = param.grad
    if grad is None:
        shape = Grid(_ranges(param, placements)).local_shape
        zeros = torch.zeros(shape, dtype=param.dtype, device=_local(param).device)
        grad = DTensor.from_local(
            zeros, param.device_mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
        )
    assert isinstance(grad, DTensor)
    if grad.placements not in (placements, param.placements):
        raise ValueError(
            f"{name}: its gradient has placements {tuple(grad.placements)}, and had {placements} at earlier steps."
        )
    return grad.redistribute(placements=param.placements)


def _check_gradient(name: str, param: DTensor, grad: DTensor) -> None:
    """What is known to come as addends is added up before; nobody can begin with it alone."""
    if grad.placements != param.placements:
        raise ValueError(
            f"{name}: its gradient has placements {tuple(grad.placements)}, the parameter {tuple(param.placements)}. "
            "Frugal adds up Partial gradients of replicated parameters; others have to be placed as their parameters: "
            "param.grad = param.grad.redistribute(placements=param.placements)."
        )


# --- which part of a DTensor lies here --------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """One mesh axis that cuts a dim into ``parts``, of which this rank has number ``place``, inside of each of
    ``groups``.
    """

    groups: int
    parts: int
    place: int


def _part(name: str, tensor: DTensor) -> LocalShard:
    """This rank's part, by the placements and by what lies here. ValueError if the two do not fit."""
    if any(p.is_partial() for p in tensor.placements):
        raise ValueError(
            f"{name}: placements {tuple(tensor.placements)} are not supported: a Partial parameter has no values."
        )
    local = tuple(tensor.to_local().shape)
    if tensor.device_mesh.get_coordinate() is None:  # of another mesh
        return Box(((0, 0),) * tensor.dim())
    for nested in (True, False):
        ranges = _ranges(tensor, tensor.placements, nested)
        if Grid(ranges).local_shape == local:
            apart = any(_groups(tensor, dim, nested) > 1 for dim in range(tensor.dim()))
            return Grid(ranges) if apart else Box(tuple(one[0] if one else (0, 0) for one in ranges))
    raise ValueError(
        f"{name}: this rank's shard is {local}, which {tuple(tensor.placements)} of {tuple(tensor.shape)} on mesh "
        f"{tuple(tensor.device_mesh.shape)} do not give. This torch version shards in a way Frugal does not know."
    )


def _ranges(tensor: DTensor, placements: Sequence[Placement], nested: bool = True) -> tuple[tuple[Span, ...], ...]:
    """Of each dim the half-open ranges that this rank holds, in the order in which they lie here."""
    ranges = []
    for dim, length in enumerate(tensor.shape):
        where = torch.arange(length, device="cpu")
        for cut in _cuts(tensor, placements, dim, nested):
            groups = [group.chunk(cut.parts) for group in where.chunk(cut.groups)]
            where = torch.cat([parts[cut.place] for parts in groups if cut.place < len(parts)] or [where[:0]])
        ranges.append(tuple(_runs(where)))
    return tuple(ranges)


def _runs(where: Tensor) -> Iterator[Span]:
    """Maximal ranges of consecutive numbers."""
    if len(where):
        breaks = (torch.nonzero(where[1:] != where[:-1] + 1).view(-1) + 1).tolist()
        for start, stop in zip([0, *breaks], [*breaks, len(where)], strict=True):
            yield int(where[start]), int(where[stop - 1]) + 1


def _cuts(tensor: DTensor, placements: Sequence[Placement], dim: int, nested: bool) -> list[_Cut]:
    """How the mesh axes cut one dim, in order.

    ``nested``: what FSDP2 cuts after another mesh axis did (tensor, expert parallelism) it cuts where that one has left
    it, and calls it _StridedShard, which says the same in other words as long as everything divides evenly.
    """
    mesh = tensor.device_mesh
    cuts: list[_Cut] = []
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for axis, placement in reversed(list(enumerate(placements))):
        on = getattr(placement, "dim", None)
        if on is None or on % tensor.dim() != dim:
            continue
        groups, after = int(getattr(placement, "split_factor", 1)), prod(cut.parts for cut in cuts)
        cut = _Cut(groups, mesh.size(axis), coordinate[axis])
        if nested and groups == after:
            cuts.append(cut._replace(groups=1) if groups > 1 else cut)
        else:
            cuts.insert(0, cut)
    return cuts


def _groups(tensor: DTensor, dim: int, nested: bool) -> int:
    """Into how many pieces a dim may fall on a rank: the same on every rank, whatever it holds."""
    return prod(cut.groups for cut in _cuts(tensor, tensor.placements, dim, nested))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --- the ranks of several meshes --------------------------------------------------------------------------------------

_GROUPS: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()
"""By default group: the groups that were made, by their ranks."""


def mesh_group(tensors: Sequence[Tensor]) -> Any:
    """The process group of all ranks of all meshes that these DTensors live on. Collective."""
    meshes = list(dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)))
    ranks = _connected(meshes)
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    known = _GROUPS.setdefault(dist.group.WORLD, {})
    for mesh in meshes:
        if mesh.ndim == 1:
            known.setdefault(tuple(sorted(mesh.mesh.tolist())), mesh.get_group())
    if ranks not in known:  # without the other ranks of the world: they may train something else
        known[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return known[ranks]


def _connected(meshes: Sequence[Any]) -> tuple[int, ...]:
    """All ranks of these meshes, and of those that others of them are in: the same on each of them.

    A mesh that contains all others says it all. Otherwise every rank tells what it knows along every mesh axis.
    """
    known = {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}
    if len(known) > max(mesh.size() for mesh in meshes):
        here = [mesh for mesh in meshes if mesh.get_coordinate() is not None]
        axes = [Ranks(group, dist.get_rank(group), group.size()) for mesh in here for group in mesh.get_all_groups()]
        for ranks in axes * len(axes):
            known |= {rank for other in gather_objects(ranks, known) for rank in other}
    return tuple(sorted(known))


def is_slice(tensors: Sequence[Tensor], ranks: int) -> bool:
    """Whether these DTensors live on a part of a larger mesh, whose other ranks may hold other layers."""
    meshes = [tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)]
    return any(_root(mesh).size() > ranks for mesh in meshes)


def _root(mesh: Any) -> Any:
    find: Callable[[], Any] | None = getattr(mesh, "_get_root_mesh", None)
    return mesh if find is None else find()
