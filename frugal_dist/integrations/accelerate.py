"""Frugal for loops with Accelerate: checkpoints of ``save_state`` that resume on any engine and number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from frugal_dist import checkpoint, engines
from frugal_dist.checkpoint.portable_copy import load_beside, save_beside, stands_in
from frugal_dist.engines import hooks


def portable_checkpoints(accelerator: Any, model: Any, optimizer: Any) -> None:
    """From now on ``save_state`` also writes a folder "frugal", which ``load_state`` needs with other ranks or engines.

    With the layout that saved it ``load_state`` loads what Accelerate itself has written, bit for bit. The folder takes
    the room of weights and state once more.

        model, optimizer = accelerator.prepare(model, optimizer)
        portable_checkpoints(accelerator, model, optimizer)

    Args:
        accelerator: the Accelerator.
        model: what ``prepare`` gave back for the one model.
        optimizer: what ``prepare`` gave back for its Frugal.
    """
    frugal = checkpoint.unwrap(optimizer)
    if engines.keeps_rank_zero_only(frugal):
        frugal.saved_elsewhere = True

    def saving(inner: Callable[..., Any]) -> Callable[..., Any]:
        def save_state(*args: Any, **kwargs: Any) -> Any:
            folder = inner(*args, **kwargs)
            save_beside(Path(folder), model, frugal)
            return folder

        return save_state

    def loading(inner: Callable[..., Any]) -> Callable[..., Any]:
        def load_state(input_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
            folder = _newest(accelerator) if input_dir is None else Path(input_dir).expanduser()
            if not stands_in(folder, model, frugal):
                return inner(input_dir, *args, **kwargs)
            with _alone(accelerator):
                result = inner(str(folder), *args, **kwargs)
            load_beside(folder, model, frugal)
            return result

        return load_state

    hooks.wrap(accelerator, "save_state", saving)
    hooks.wrap(accelerator, "load_state", loading)


def _newest(accelerator: Any) -> Path:
    """Where automatic names have the last checkpoint; Accelerate itself says if there is none."""
    root = Path(accelerator.project_dir or os.curdir) / "checkpoints"
    numbered = {int(path.name.rpartition("_")[2]): path for path in root.glob("checkpoint_*")}
    return numbered[max(numbered)] if numbered else root


@contextmanager
def _alone(accelerator: Any) -> Iterator[None]:
    """The Accelerator without model and optimizer: what is left are schedules, samplers, generators, custom objects."""
    kept = accelerator._models, accelerator._optimizers
    accelerator._models, accelerator._optimizers = [], []
    try:
        yield
    finally:
        accelerator._models, accelerator._optimizers = kept
