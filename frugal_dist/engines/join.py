"""torch's join context for ranks with unequal numbers of batches (``with model.join():``): refused before it begins.

A rank that is out of batches answers the collectives of DDP, and no others, so those of a step would never end. It does
not call step() any more, and one without any batch never did: only entering the context is something all ranks do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from frugal_dist.sharding.collectives import ranks_of

_WATCHED: WeakKeyDictionary[Optimizer, Any] = WeakKeyDictionary()
"""Every live optimizer of ours with its process group."""

REFUSAL = (
    "A join context goes on with the ranks that still have batches, but Frugal's step() needs all ranks: they would "
    "wait for ever. Give all ranks equally many batches (DistributedSampler does), let them end together "
    "(model.join(throw_on_early_termination=True), without the optimizer), or build Frugal with process_group=None: "
    "then each rank steps by itself and keeps all of the state, as AdamW does under DDP."
)


def watch(optimizer: Optimizer, process_group: Any) -> None:
    """From now on ValueError, on all ranks, where a join context is made for what ``optimizer`` trains."""
    _WATCHED[optimizer] = process_group
    if dist.is_available():
        _check_joins()


@functools.cache
def _check_joins() -> None:
    from torch.distributed.algorithms.join import Join

    inner = Join.__init__

    @functools.wraps(inner)
    def checked(
        self: Any,
        joinables: Sequence[Any],
        enable: bool = True,
        throw_on_early_termination: bool = False,
        **kwargs: Any,
    ) -> None:
        if enable:
            _refuse(joinables, throw_on_early_termination)
        inner(self, joinables, enable, throw_on_early_termination, **kwargs)  # type: ignore[arg-type]

    Join.__init__ = checked  # type: ignore[method-assign]


def _refuse(joinables: Sequence[Any], ends_together: bool) -> None:
    joined = {id(param) for one in joinables if isinstance(one, nn.Module) for param in one.parameters()}
    for optimizer, process_group in list(_WATCHED.items()):
        trains = any(id(param) in joined for group in optimizer.param_groups for param in group["params"])
        waits = trains and not ends_together and not ranks_of(process_group).alone
        if waits or any(one is optimizer for one in joinables):
            raise ValueError(REFUSAL)
