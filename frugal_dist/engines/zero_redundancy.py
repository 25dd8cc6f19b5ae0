"""torch's ZeroRedundancyOptimizer, which builds an optimizer on each rank for a part of the parameters."""

from __future__ import annotations

from frugal_dist.engines.callers import calling, loaded_classes

_MODULES = ("torch.distributed.optim.zero_redundancy_optimizer",)


def refuse() -> None:
    """ValueError if a ZeroRedundancyOptimizer is building an optimizer: all ranks do so alike.

    It deals out whole parameters by size. Ranks without a matrix could build nothing, "blockwise" would choose among a
    rank's own, and it hands over no names.
    """
    if calling(loaded_classes("ZeroRedundancyOptimizer", _MODULES)) is not None:
        raise ValueError(
            "ZeroRedundancyOptimizer gives each rank an optimizer for some of the parameters. Frugal shares its state "
            "among the ranks by itself: build Frugal(split_parameters(model), ...) on every rank, without it, and save "
            "with frugal_dist.checkpoint."
        )
