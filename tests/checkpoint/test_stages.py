"""Pipeline stages save one checkpoint of the whole model; what would lose a stage is refused on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from meshes import mesh
from threads import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from frugal_dist import Frugal, checkpoint, split_parameters

WORLD = "auto"


class Layer(nn.Module):
    """A projected matrix, a frozen one, and a buffer of its own."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.frozen = nn.Linear(12, 6, bias=False).requires_grad_(False)
        self.register_buffer("seen", torch.full((3,), float(number)))


class Layers(nn.Module):
    """Some layers of a model of four, under the names that they have there; a buffer that every stage has."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(0)
        every = [Layer(number) for number in range(4)]
        self.layers = nn.ModuleDict({str(number): every[number] for number in numbers})
        self.register_buffer("positions", torch.arange(5.0))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return split_parameters(model, project=["layers.*.linear.weight"])


def stage(count: int, projection: str, **options: Any) -> tuple[Layers, Frugal]:
    """This rank's layers, of ``count`` stages with FSDP2 in each."""
    axes = mesh(count, dist.get_world_size() // count, names="pf")
    model = Layers(tuple(range(axes.get_local_rank("p"), 4, count)))
    fully_shard(model, mesh=axes["f"])
    whole = {} if projection == "svd" else {"whole_model": groups_of(Layers((0, 1, 2, 3)))}
    return model, Frugal(groups_of(model), **{"projection": projection, "density": 0.5, **whole, **options})


def alone(projection: str) -> tuple[Layers, Frugal]:
    model = Layers((0, 1, 2, 3))
    return model, Frugal(groups_of(model), projection=projection, density=0.5, process_group=None)


def step(model: nn.Module, optimizer: Frugal) -> None:
    for name, param in model.named_parameters():
        param.grad = param.detach() * (2.0 + len(name)) if param.requires_grad else None
    optimizer.step()


def spoil(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()


def content(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in state.items()}


@pytest.mark.parametrize("projection", ["svd", "blockwise"])
def test_a_model_goes_from_stages_to_one_process_and_back(projection: str, tmp_path: Path) -> None:
    """Weights, state, frozen parameters and buffers; each rank's extra; the folder of steps."""

    def save(rank: int) -> dict[str, torch.Tensor]:
        model, optimizer = stage(2, projection)
        step(model, optimizer)
        checkpoint.save_step(tmp_path, 1, model, optimizer, {"rank": rank}, process_group=WORLD)
        checkpoint.save_step(tmp_path, 2, model, optimizer, {"rank": rank}, keep_last=1, process_group=WORLD)
        step(model, optimizer)
        return content(model)

    want = {name: value for found in run_ranks(4, save) for name, value in found.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000002"]
    model, optimizer = alone(projection)
    spoil(model)
    found = checkpoint.load_latest(tmp_path, model, optimizer)
    assert found == (2, {"rank": 0})
    checkpoint.save(tmp_path / "alone", model, optimizer)
    step(model, optimizer)
    assert model.state_dict().keys() == want.keys()
    assert all(torch.allclose(value, want[name], atol=1e-6) for name, value in model.state_dict().items())
    assert [float(layer.seen[0]) for layer in model.layers.values()] == [0.0, 1.0, 2.0, 3.0]  # type: ignore[union-attr]

    def load(rank: int) -> tuple[Any, dict[str, torch.Tensor]]:
        model, optimizer = stage(4 if projection == "svd" else 2, projection)
        spoil(model)
        extra = checkpoint.load(tmp_path / "step_000002", model, optimizer, process_group=WORLD)
        before = content(model)
        checkpoint.load(tmp_path / "alone", model, optimizer, process_group=WORLD)
        assert all(torch.equal(value, before[name]) for name, value in content(model).items())
        step(model, optimizer)
        return extra["rank"], content(model)

    for rank, (extra, found_here) in enumerate(run_ranks(4, load)):
        assert extra == rank
        assert all(torch.allclose(value, want[name], atol=1e-6) for name, value in found_here.items())


Action = Callable[[Path, int], None]


def refused(action: Action, folder: Path, ranks: int = 4) -> list[str]:
    """What every rank hears; nothing is left behind."""

    def body(rank: int) -> str:
        try:
            action(folder, rank)
        except checkpoint.CheckpointError as error:
            return str(error)
        return ""

    before = sorted(folder.rglob("*"))
    found = run_ranks(ranks, body)
    assert sorted(folder.rglob("*")) == before
    return found


@pytest.mark.parametrize("projection", ["svd", "blockwise"])
def test_a_stage_that_saves_alone_is_refused(projection: str, tmp_path: Path) -> None:
    """Another would replace its checkpoint, or they would clear away each other's. By the mesh, and by whole_model."""

    def save(folder: Path, rank: int) -> None:
        checkpoint.save(folder / "saved", *stage(2, projection))

    for message in refused(save, tmp_path):
        assert "process_group=torch.distributed.group.WORLD" in message


def test_replicas_on_parts_of_a_mesh_save_what_is_whole(tmp_path: Path) -> None:
    """Each half of a mesh trains the whole model by itself, and says so."""

    def save(rank: int) -> bool:
        model = Layers((0, 1))
        axes = mesh(2, 2, names="pf")
        fully_shard(model, mesh=axes["f"])
        optimizer = Frugal(groups_of(model), whole_model=groups_of(model))
        return checkpoint.save(tmp_path / f"half{axes.get_local_rank('p')}", model, optimizer)

    assert run_ranks(4, save) == [True] * 4
    assert sorted(checkpoint.SavedWeights(tmp_path / "half1").shapes) == sorted(dict(Layers((0, 1)).named_parameters()))


def test_names_that_begin_anew_on_every_stage_are_refused(tmp_path: Path) -> None:
    def save(folder: Path, rank: int) -> None:
        model = Layers((0, 1))  # on both stages
        fully_shard(model, mesh=mesh(2, 2, names="pf")["f"])
        checkpoint.save(folder / "saved", model, Frugal(groups_of(model)), process_group=WORLD)

    for message in refused(save, tmp_path):
        assert "layers.0.linear.weight is the name of a tensor of rank 2 and of one of a stage before" in message
        assert "that they have in the whole model" in message


def test_a_buffer_of_another_shape_on_every_stage_is_refused(tmp_path: Path) -> None:
    def save(folder: Path, rank: int) -> None:
        model, optimizer = stage(2, "svd")
        model.register_buffer("positions", torch.zeros(3 + rank // 2))
        checkpoint.save(folder / "saved", model, optimizer, process_group=WORLD)

    assert all(message.startswith("positions is the name") for message in refused(save, tmp_path))


def saved(folder: Path) -> Path:
    run_ranks(4, lambda rank: checkpoint.save(folder / "saved", *stage(2, "svd"), process_group=WORLD))
    return folder / "saved"


def test_a_stage_that_loads_alone_hears_what_is_missing(tmp_path: Path) -> None:
    place = saved(tmp_path)
    for message in refused(lambda folder, rank: checkpoint.load(place, *stage(2, "svd")) and None, tmp_path):
        assert "only in the checkpoint: layers." in message
        assert "load on those of all stages: process_group=" in message


def test_layers_that_no_stage_has_are_missed(tmp_path: Path) -> None:
    """Three of four layers on two stages."""
    place = saved(tmp_path)

    def load(folder: Path, rank: int) -> None:
        axes = mesh(2, 2, names="pf")
        model = Layers((0, 2) if axes.get_local_rank("p") == 0 else (1,))
        fully_shard(model, mesh=axes["f"])
        checkpoint.load(place, model, Frugal(groups_of(model)), process_group=WORLD)

    for message in refused(load, tmp_path):
        assert "only in the checkpoint: layers.3." in message
        assert "layers.0" not in message


def test_a_group_without_some_of_the_ranks_is_refused(tmp_path: Path) -> None:
    def save(folder: Path, rank: int) -> None:
        stages = stage(2, "svd")
        groups = [dist.new_group([0, 1, 2]), dist.new_group([3])]
        checkpoint.save(folder / "saved", *stages, process_group=groups[rank == 3])

    for message in refused(save, tmp_path):
        assert "has not all ranks of this optimizer (2, 3)" in message
