"""The ways to save and load a run of plain PyTorch; DeepSpeed's own is tested in tests/engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from frugal_dist import checkpoint


@dataclass
class Running:
    """A run at work. ``engine``: DeepSpeed's, or the model itself; ``optimizer``: Frugal, or DeepSpeed's around it."""

    engine: Any
    optimizer: Any
    scheduler: Any


def _save_portable(folder: Path, run: Running, done: int) -> None:
    extra = {"done": done, "schedule": run.scheduler.state_dict()}
    checkpoint.save(folder, run.engine, run.optimizer, extra)


def _load_portable(folder: Path, run: Running) -> int:
    extra = checkpoint.load(folder, run.engine, run.optimizer)
    checkpoint.load_schedule(run.scheduler, extra["schedule"])
    done: int = extra["done"]
    return done


def _own_file(folder: Path) -> Path:
    return folder / f"rank{dist.get_rank() if dist.is_initialized() else 0}.pt"


def _save_own_file(folder: Path, run: Running, done: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: getattr(run, name).state_dict() for name in ("engine", "optimizer", "scheduler")}
    torch.save({**parts, "done": done}, _own_file(folder))


def _load_own_file(folder: Path, run: Running) -> int:
    found = torch.load(_own_file(folder), weights_only=True)
    for name in ("engine", "optimizer", "scheduler"):
        getattr(run, name).load_state_dict(found[name])
    done: int = found["done"]
    return done


def _dcp_state(run: Running, done: int) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = get_state_dict(run.engine, run.optimizer)
    return {"model": model, "optimizer": optimizer, "scheduler": run.scheduler.state_dict(), "done": done}


def _save_dcp(folder: Path, run: Running, done: int) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(_dcp_state(run, done), checkpoint_id=folder)


def _load_dcp(folder: Path, run: Running) -> int:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    state = _dcp_state(run, -1)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(run.engine, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    done: int = state["done"]
    return done


@dataclass(frozen=True)
class Way:
    """``save(folder, run, done)`` and ``load(folder, run) -> done``, called on every rank."""

    save: Callable[[Path, Running, int], None]
    load: Callable[[Path, Running], int]


PORTABLE = "frugal_dist.checkpoint"
WAYS = {
    PORTABLE: Way(_save_portable, _load_portable),
    "state_dict": Way(_save_own_file, _load_own_file),
    "DCP": Way(_save_dcp, _load_dcp),
}
