"""Copies and pickles of an optimizer: what the methods of ``Frugal`` do by which copy and pickle ask for them.

All of it goes along but what is found out again at the next step. The state is as ``state_dict`` has it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any, TypeVar

from torch.optim import Optimizer

from frugal_dist import engines
from frugal_dist.parameters.changes import as_made
from frugal_dist.saving.state_dict import Loaded, pack_all
from frugal_dist.sharding.collectives import outlives_its_process

T = TypeVar("T", bound=Optimizer)

KEPT = (
    "_originals",
    "_shard_state",
    "_process_group",
    "_no_decay",
    "_choice",
    "_loaded",
    "_settled",
    "_saved_elsewhere",
    "_whole",
)


def contents(optimizer: Any, of_torch: dict[str, Any]) -> dict[str, Any]:
    """What a copy is made of.

    Args:
        optimizer: Frugal.
        of_torch: what torch's optimizers keep.
    """
    kept = {**of_torch, **{key: optimizer.__dict__[key] for key in KEPT}}
    runtime = optimizer._runtime or optimizer._before
    if runtime is not None:
        with as_made(optimizer._groups, optimizer._settled):
            packed = pack_all(runtime, optimizer.state)
        stores = {tensor: packed[id(tensor)] for tensor in optimizer.state if id(tensor) in packed}
        kept.update(state=defaultdict(dict, stores), _loaded=Loaded())
    return kept


def shallow(optimizer: T) -> T:
    """A copy that shares tensors with the original."""
    twin = type(optimizer).__new__(type(optimizer))
    twin.__setstate__(optimizer.__getstate__())
    return twin


def deep(optimizer: T, memo: dict[int, Any]) -> T:
    """A copy that belongs to the same ranks: a process group cannot be copied, and is never guessed.

    Args:
        optimizer: Frugal, or a wrapper that copies all attributes of its own.
        memo: as in ``copy.deepcopy``.
    """
    twin = memo[id(optimizer)] = type(optimizer).__new__(type(optimizer))
    kept = optimizer.__getstate__()
    group = kept.get("_process_group")
    memo[id(group)] = group
    twin.__setstate__(copy.deepcopy(kept, memo))
    return twin


def without_ranks(reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """What pickle writes, in which a process group has no place.

    Args:
        reduced: what ``object.__reduce_ex__`` says.

    Raises:
        ValueError: another process could not find its ranks.
    """
    kept = reduced[2]
    if "_process_group" not in kept:  # a wrapper
        return reduced
    if not outlives_its_process(kept["_process_group"]):
        raise ValueError(
            "An optimizer with a process_group of its own cannot be pickled: another process would not find those "
            "ranks again. Save its state_dict() and give process_group= to the new optimizer."
        )
    group = None if kept["_process_group"] is None else "auto"
    return (*reduced[:2], {**kept, "_process_group": group}, *reduced[3:])


def wake(optimizer: Any, copied: bool) -> None:
    """Make an optimizer that has its ``contents`` ready to step.

    Args:
        optimizer: Frugal.
        copied: False if torch has only put other groups and other state into it.
    """
    if copied:  # the sources of a DeepSpeed engine do not come along
        optimizer._groups = list(optimizer.param_groups)
        optimizer._sources = [lambda: None for _ in optimizer._originals]
        optimizer._release = None  # its hooks are on another model
    optimizer.__dict__.update(_runtime=None, _before=None, _started=False, _checked=set())
    engines.announce(optimizer, optimizer._process_group)
    optimizer.__dict__.update(_saving_checked=False, _told=False, _parts_told=False)
    optimizer._summarised = copied or optimizer._summarised  # a copy's line is that of the first
