"""Parameters on meshes of several axes, as tensor, expert, sequence and pipeline parallelism leave them.

Every local tensor is cut by hand, axis after axis in the order in which the parallelisms are applied. Flat numbers that
are cut the same way say where its entries belong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from storages import Groups, Held, Named, groups_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from frugal_dist import Frugal


@dataclass(frozen=True)
class Cut:
    """A mesh axis cuts a dim; ``packed``: each of so many layers that were packed into one by itself."""

    axis: int
    dim: int
    packed: int = 1


@dataclass(frozen=True)
class Place:
    """A mesh, and its cuts in the order in which they are made. ``addends``: gradients come as Partial."""

    mesh: DeviceMesh
    cuts: tuple[Cut, ...] = ()
    addends: bool = False

    def placements(self) -> list[Placement]:
        """As FSDP2 and DTensor name it: who cuts a dim after axes to its right is strided."""
        found: list[Placement] = [Replicate()] * self.mesh.ndim
        for number, cut in enumerate(self.cuts):
            before = [other for other in self.cuts[:number] if other.dim == cut.dim and other.axis > cut.axis]
            factor = cut.packed * prod(self.mesh.size(other.axis) for other in before)
            found[cut.axis] = Shard(cut.dim) if factor == 1 else _StridedShard(cut.dim, split_factor=factor)
        return found

    def local(self, whole: Tensor) -> Tensor:
        """This rank's part."""
        coordinate = self.mesh.get_coordinate()
        assert coordinate is not None
        for cut in self.cuts:
            parts, index = self.mesh.size(cut.axis), coordinate[cut.axis]
            whole = torch.cat([_chunk(one, parts, index, cut.dim) for one in whole.chunk(cut.packed, cut.dim)], cut.dim)
        return whole.clone()

    def put(self, whole: Tensor) -> DTensor:
        return self._made(self.local(whole), whole, self.placements())

    def put_gradient(self, whole: Tensor) -> DTensor:
        """The same, or addends along the axes that do not cut."""
        if not self.addends:
            return self.put(whole)
        placements = [Partial() if p.is_replicate() else p for p in self.placements()]
        copies = prod(self.mesh.size(axis) for axis, p in enumerate(placements) if p.is_partial())
        rank = self.mesh.get_coordinate()[-1]  # type: ignore[index]
        share = {0: 1.0 + (copies - 1) * 0.25}.get(rank, -0.25)  # adds up to 1 on the last axis alone
        return self._made(self.local(whole) * share, whole, placements)

    def _made(self, local: Tensor, whole: Tensor, placements: Sequence[Placement]) -> DTensor:
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )


def _chunk(whole: Tensor, parts: int, index: int, dim: int) -> Tensor:
    found = whole.chunk(parts, dim)
    return found[index] if index < len(found) else whole.narrow(dim, 0, 0)


Places = Callable[[str, Tensor], Place]


def on_places(
    weights: Named,
    groups: Groups,
    options: dict[str, Any],
    place: Places,
    drop: Callable[[str, int], bool] | None = None,
    ranks: Any = None,
) -> Held:
    """Each parameter as ``place(name, tensor)`` says. ``drop(name, step)``: gradients that this rank does not have.
    ``ranks``: the group of those who have any, if not all.
    """
    places = {name: place(name, weight) for name, weight in weights.items()}
    named = {name: nn.Parameter(places[name].put(weight)) for name, weight in weights.items()}
    optimizer = Frugal(groups_of(named, groups), **options)
    steps = 0

    def step(grads: Named) -> None:
        nonlocal steps
        for name, param in named.items():
            lacks = name not in grads or (drop is not None and drop(name, steps))
            param.grad = None if lacks else places[name].put_gradient(grads[name].to(param.dtype))
        steps += 1
        optimizer.step()

    return Held(optimizer, step, lambda: together(named, places, weights, ranks))


def together(named: dict[str, nn.Parameter], places: dict[str, Place], like: Named, ranks: Any = None) -> Named:
    """Every rank's parts put together; copies must agree bit for bit."""
    mine = []
    for name, param in named.items():
        data = param.detach()
        assert isinstance(data, DTensor)
        numbers = places[name].local(torch.arange(like[name].numel()).view(like[name].shape))
        mine.append((name, numbers, data.to_local()))
    everyone: list[Any] = [None] * dist.get_world_size(ranks)
    dist.all_gather_object(everyone, mine, group=ranks)
    found = {name: torch.full_like(tensor, float("nan")) for name, tensor in like.items()}
    for name, numbers, piece in (entry for pieces in everyone for entry in pieces if entry[0] in like):
        whole = found[name].view(-1)
        before = whole[numbers]
        assert before.isnan().all() or torch.equal(before, piece), f"copies of {name} differ"
        whole[numbers] = piece
    return found


def mesh(*shape: int, names: str = "") -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(names) or None)


# --- layouts ----------------------------------------------------------------------------------------------------------

ROWWISE = ("wide", "broad", "row")
"""As o_proj and down_proj: their columns are cut. The others are cut by rows, as q_proj."""
KEPT = ("norm", "scale", "small")
"""What tensor parallelism leaves whole."""


def _tensor_parallel(name: str, weight: Tensor, axis: int) -> tuple[Cut, ...]:
    if name in KEPT:
        return ()
    return (Cut(axis, weight.dim() - 1 if name in ROWWISE else weight.dim() - 2),)


def tensor_parallel(weights: Named, groups: Groups, options: dict[str, Any]) -> Held:
    """TP alone."""
    tp = mesh(dist.get_world_size())
    return on_places(weights, groups, options, lambda n, w: Place(tp, _tensor_parallel(n, w, 0)))


def sequence_parallel(weights: Named, groups: Groups, options: dict[str, Any]) -> Held:
    """TP where each rank has its own tokens' part of the gradients of what is whole."""
    tp = mesh(dist.get_world_size())
    return on_places(weights, groups, options, lambda n, w: Place(tp, _tensor_parallel(n, w, 0), n in KEPT))


def fsdp_tensor_parallel(weights: Named, groups: Groups, options: dict[str, Any]) -> Held:
    """FSDP2 on the first axis, TP on the second; what TP leaves alone lives on FSDP2's mesh."""
    both = mesh(dist.get_world_size() // 2, 2, names="ft")

    def place(name: str, weight: Tensor) -> Place:
        cuts = _tensor_parallel(name, weight, 1)
        return Place(both, (*cuts, Cut(0, 0))) if cuts else Place(both["f"], (Cut(0, 0),))

    return on_places(weights, groups, options, place)


def fsdp_packed(weights: Named, groups: Groups, options: dict[str, Any]) -> Held:
    """The same with pairs of layers in one matrix, each cut by itself."""
    both = mesh(dist.get_world_size() // 2, 2, names="ft")

    def place(name: str, weight: Tensor) -> Place:
        cuts = tuple(Cut(cut.axis, cut.dim, 2) for cut in _tensor_parallel(name, weight, 1))
        return Place(both, (*cuts, Cut(0, 0))) if cuts else Place(both["f"], (Cut(0, 0),))

    return on_places(weights, groups, options, place)


def hybrid_tensor_parallel(weights: Named, groups: Groups, options: dict[str, Any]) -> Held:
    """HSDP on the first two axes, TP on the third."""
    all_axes = mesh(2, 2, 2, names="rft")

    def place(name: str, weight: Tensor) -> Place:
        cuts = _tensor_parallel(name, weight, 2)
        return Place(all_axes, (*cuts, Cut(1, 0))) if cuts else Place(all_axes["r", "f"], (Cut(1, 0),))

    return on_places(weights, groups, options, place)


def expert_parallel(dim: int) -> Callable[[Named, Groups, dict[str, Any]], Held]:
    """FSDP2 over all ranks; experts over a mesh of their own: some on each rank, then FSDP2 on ``dim``."""

    def build(weights: Named, groups: Groups, options: dict[str, Any]) -> Held:
        dense = mesh(dist.get_world_size())
        experts = mesh(dist.get_world_size() // 2, 2)

        def place(name: str, weight: Tensor) -> Place:
            return Place(experts, (Cut(1, 0), Cut(0, dim))) if weight.dim() == 3 else Place(dense, (Cut(0, 0),))

        return on_places(weights, groups, options, place)

    return build


def context_parallel(weights: Named, groups: Groups, options: dict[str, Any]) -> Held:
    """FSDP2 over data and context parallelism, one axis made of two."""
    flat = mesh(2, dist.get_world_size() // 2, names="dc")._flatten()
    return on_places(weights, groups, options, lambda n, w: Place(flat, (Cut(0, 0),)))


def pipeline(weights: Named, groups: Groups, options: dict[str, Any], count: int = 2) -> Held:
    """Stages, FSDP2 inside of each; of two every other layer is the second one's."""
    stages = mesh(count, dist.get_world_size() // count, names="pf")
    mine = set(list(weights)[stages.get_local_rank("p") :: count])
    everything = groups_of({name: nn.Parameter(weight) for name, weight in weights.items()}, groups)
    stage = {name: weight for name, weight in weights.items() if name in mine}
    assert not isinstance(groups, set)
    own = [{**group, "params": [name for name in group["params"] if name in mine]} for group in groups]
    held = on_places(
        stage,
        [group for group in own if group["params"]],
        {"whole_model": everything, **options},
        lambda n, w: Place(stages["f"], (Cut(0, 0),)),
    )

    def full() -> Named:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, held.full())
        return {name: value for one in found for name, value in one.items()}

    return Held(held.optimizer, held.step, full)


def part_of_the_world(weights: Named, groups: Groups, options: dict[str, Any]) -> Held | None:
    """FSDP2 on ranks 1 and 3 of four; the others do something else."""
    some = DeviceMesh("cpu", [1, 3])
    if some.get_coordinate() is None:
        return None
    return on_places(weights, groups, options, lambda n, w: Place(some, (Cut(0, 0),)), ranks=some.get_group())


LAYOUTS: dict[tuple[str, int], Any] = {
    ("TP 2", 2): tensor_parallel,
    ("TP 2, sequence parallelism", 2): sequence_parallel,
    ("FSDP2 2 x TP 2", 4): fsdp_tensor_parallel,
    ("FSDP2 4 x TP 2", 8): fsdp_tensor_parallel,
    ("FSDP2 2 x TP 2, packed layers", 4): fsdp_packed,
    ("HSDP 2 x FSDP2 2 x TP 2", 8): hybrid_tensor_parallel,
    ("FSDP2 2 x EP 2", 4): expert_parallel(0),
    ("FSDP2 2 x EP 2, Shard(1)", 4): expert_parallel(1),
    ("FSDP2 4 x EP 2", 8): expert_parallel(0),
    ("two pipeline stages x FSDP2 2", 4): pipeline,
    ("context parallelism, flattened", 4): context_parallel,
    ("FSDP2 on ranks 1 and 3", 4): part_of_the_world,
}
