"""Lightning's Trainer and Fabric: what becomes of an optimizer's state there.

Nothing here imports Lightning. Its two packages come under two names each.
"""

from __future__ import annotations

import gc
from typing import Any

from frugal_dist.engines.callers import calling, loaded_classes

_STRATEGIES = tuple(
    f"{package}.strategies.strategy"
    for package in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
)


def keeps_rank_zero_only(optimizer: object) -> bool:
    """Whether checkpoints keep no other rank's ``state_dict`` of ``optimizer`` than rank 0's.

    So it is where a strategy saves as the base class does (DDP): every rank gives its state, one file is written. The
    strategies that shard write in ways of their own; ModelParallelStrategy (FSDP2) can be told to write one file.
    """
    bases = loaded_classes("Strategy", _STRATEGIES)
    strategy = _strategy_of(optimizer, bases)
    if strategy is None:
        return False
    kind = strategy.__class__  # not type(): the Trainer's wrapper has a weak proxy
    if any(kind.save_checkpoint is base.save_checkpoint for base in bases):  # type: ignore[attr-defined]
        return True
    return not getattr(strategy, "_save_distributed_checkpoint", True)


def _strategy_of(optimizer: object, bases: tuple[type, ...]) -> Any | None:
    """The strategy that drives ``optimizer``: one that is calling it, or that of the wrapper around it.

    Lightning gives an optimizer no link to either. Its wrappers are of classes made for each, below the optimizer's.
    """
    strategy = calling(bases)
    kinds = type(optimizer).__subclasses__() if bases and strategy is None else []
    for wrapper in gc.get_referrers(*kinds) if kinds else []:
        if type(wrapper) in kinds and wrapper.__dict__.get("_optimizer") is optimizer:
            strategy = wrapper.__dict__.get("_strategy") or strategy
    return strategy
