"""Who saves and loads together: the optimizer's ranks, or those of all pipeline stages, each with layers of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frugal_dist.checkpoint.errors import CheckpointError, together
from frugal_dist.optimizer import Frugal
from frugal_dist.sharding.collectives import Ranks, gather_objects, global_ranks, ranks_of

STAGE = (
    "This optimizer has a part of the model, as a pipeline stage has, and a checkpoint is of the whole model. Let the "
    "ranks of all stages save together: process_group=torch.distributed.group.WORLD, or the group of those that hold "
    "the model. If this is the whole model, say so when the optimizer is built: whole_model=split_parameters(model)."
)


def savers(frugal: Frugal, process_group: Any) -> Ranks:
    """The ranks that save one checkpoint. Collective.

    Args:
        frugal: the optimizer.
        process_group: that of all ranks that hold the model, "auto" for all there are; None: the optimizer's own.

    Raises:
        CheckpointError: on all ranks alike, where a stage would save alone.
    """
    ranks = loaders(frugal, process_group)
    if process_group is None and frugal.is_stage():
        raise CheckpointError(STAGE)
    return ranks


def loaders(frugal: Frugal, process_group: Any) -> Ranks:
    """The ranks that load one checkpoint, as for ``savers``. Collective."""
    own = frugal.everything()[0].ranks
    if process_group is None:
        return own
    ranks = ranks_of(process_group)
    if ranks.rank < 0:
        raise CheckpointError(_outside(own, ranks))
    together(ranks, lambda: _check_inside(own, ranks))
    return ranks


def _check_inside(own: Ranks, ranks: Ranks) -> None:
    if not set(global_ranks(own)) <= set(global_ranks(ranks)):
        raise CheckpointError(_outside(own, ranks))


def _outside(own: Ranks, ranks: Ranks) -> str:
    return (
        f"process_group= has not all ranks of this optimizer ({', '.join(map(str, global_ranks(own)))}). It is the "
        "group of all ranks that hold the model."
    )


def names_together(ranks: Ranks, own: Ranks, names: Mapping[str, Sequence[int]]) -> set[str]:
    """The names of all stages' parameters. Collective."""
    if ranks.size == own.size:
        return set(names)
    return {name for others in gather_objects(ranks, list(names)) for name in others}
