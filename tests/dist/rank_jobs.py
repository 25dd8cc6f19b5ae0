"""What ranks do together before a training. Runs inside each rank."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from frugal_dist import Frugal
from frugal_dist.training.distributed import ranks as group
from frugal_dist.training.distributed.place import DistEnv
from frugal_dist.training.distributed.ranks import RollCall, own_name, together


def beginning(failing: dict[int, str]) -> str:
    """What becomes of an action that fails on some ranks with these words."""
    rank = dist.get_rank()

    def action() -> str:
        if rank in failing:
            raise ValueError(failing[rank])
        return f"made by {rank}"

    try:
        return together(action)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def sharing(folders: list[str]) -> str:
    """Whether ranks with these folders have the same one before them."""
    group.APPEARS_WITHIN = 0.3
    try:
        group.check_shared(Path(folders[dist.get_rank()]), dist.get_rank())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def roll_call(silent: int, error: str) -> str:
    """What each rank makes of an error, when one of them says nothing."""
    rank = dist.get_rank()
    names = [
        own_name(0).replace("rank 0", f"rank {number}").split(",")[0] + ")" for number in range(dist.get_world_size())
    ]
    roll = RollCall(dist.distributed_c10d._get_default_store(), rank, names)
    dist.barrier()  # or the silent one may be gone before the others have met it
    if rank == silent:
        return ""
    found = roll.explained(RuntimeError(error))
    return f"{type(found).__name__}: {found}"


def meeting_twice(port: int) -> float:
    """Two trainings one after the other, rank 0 late to leave the first: what the second one adds up."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    place = DistEnv(rank, 2, rank, 2, "127.0.0.1", port, "deepspeed")
    os.environ.update(place.environment())
    with group.process_group(place):
        time.sleep(1.0 if rank == 0 else 0.0)
    with group.process_group(place):
        total = torch.ones(1)
        dist.all_reduce(total)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # the fleet leaves one
    return float(total)


def joining(batches: tuple[int, ...]) -> tuple[list[str], Tensor]:
    """What join contexts say to ranks that have so many batches, and the weights after one that ends well."""
    model, told = DistributedDataParallel(nn.Linear(6, 8, bias=False)), []
    with torch.no_grad():
        model.module.weight.fill_(0.5)
    groups = [{"params": [("weight", model.module.weight)], "projected": True}]
    together = Frugal(groups, density=0.5)

    def train(optimizer: Frugal) -> None:
        for batch in range(batches[dist.get_rank()]):
            optimizer.zero_grad()
            model(torch.full((2, 6), 1.0 + batch)).square().sum().backward()
            optimizer.step()

    for joined in ([model], [model, together], [together]):
        try:
            with Join(joined):
                train(together)
        except ValueError as error:
            told.append(str(error))
    try:
        with model.join(throw_on_early_termination=True):
            train(together)
    except RuntimeError as error:
        told.append(str(error))
    optimizer = Frugal(groups, density=0.5, process_group=None)
    del together, joined
    gc.collect()
    with model.join():
        train(optimizer)
    return told, model.module.weight.detach()
