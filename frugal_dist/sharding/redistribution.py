"""The route of one basis matrix on one rank: compute tiles, where gradients come from, where updates go."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from operator import add

from frugal_dist.sharding.placement import Transfer, transfers_for
from frugal_dist.sharding.tile import Holders, Layout, Tile, elements, holders, is_replicated, owned


@dataclass(frozen=True)
class RedistributionPlan:
    """``home`` is the local storage tile that contains a compute tile; ``in_place`` says that nobody else holds it.

    ``gradient_in`` and ``update_out`` list this rank's moves, its own copies included; ``travels_*`` say whether any
    rank moves anything, which all ranks answer alike. ``gathered``: every rank holds everything, so updates go to all.
    ``divided``: there is more than one compute tile.
    """

    layout: Layout
    tiles: tuple[Tile, ...]
    home: tuple[Tile | None, ...]
    in_place: tuple[bool, ...]
    gradient_in: tuple[Transfer, ...]
    update_out: tuple[Transfer, ...]
    travels_in: bool
    travels_out: bool
    gathered: bool
    numel_per_rank: tuple[int, ...]
    divided: bool


@dataclass(frozen=True)
class Redistribution:
    """From where a matrix is stored to where it is computed. What is the same on every rank is found once."""

    storage: Layout
    compute: Layout

    @cached_property
    def held(self) -> Holders:
        """Who has each tile of the storage."""
        return holders(self.storage)

    @cached_property
    def computed(self) -> Holders:
        """Who has each tile of the computation."""
        return holders(self.compute)

    @cached_property
    def _homes(self) -> list[Tile | None]:
        return [owned(self.storage[k], tile) for k, tiles in enumerate(self.compute) for tile in tiles]

    @cached_property
    def divided(self) -> bool:
        """Whether the matrix computes in parts."""
        return len(self.computed) > 1

    @cached_property
    def travels_in(self) -> bool:
        return None in self._homes

    @cached_property
    def travels_out(self) -> bool:
        return any(home is None or len(self.held[home]) > 1 for home in self._homes)

    @cached_property
    def numel_per_rank(self) -> tuple[int, ...]:
        """Elements that every rank stores and computes."""
        return tuple(elements(mine) + elements(here) for mine, here in zip(self.storage, self.compute, strict=True))

    def route(self, rank: int, index: int) -> RedistributionPlan:
        """One rank's. ``index`` spreads replicated sources over their holders."""
        storage, compute, mine = self.storage, self.compute, self.compute[rank]
        if storage == compute:  # one process, or replicas that compute everything everywhere
            return RedistributionPlan(
                compute, mine, mine, (True,) * len(mine), (), (), False, False, False, (0,) * len(storage), self.divided
            )
        home = tuple(owned(storage[rank], tile) for tile in mine)
        in_place = tuple(outer is not None and len(self.held[outer]) == 1 for outer in home)
        foreign = {tile for tile, outer in zip(mine, home, strict=True) if outer is None}
        remote = {tile for tile, place in zip(mine, in_place, strict=True) if not place}
        inward, outward = (
            transfers_for(self.held, compute, rank, index),
            transfers_for(self.computed, storage, rank, index),
        )
        gradient_in = [m for m in inward if m.target != rank or m.target_tile in foreign]
        update_out = [m for m in outward if m.source != rank or m.source_tile in remote]
        return RedistributionPlan(
            layout=compute,
            tiles=mine,
            home=home,
            in_place=in_place,
            gradient_in=tuple(m for m in gradient_in if m.source != m.target or m.target_tile in foreign),
            update_out=tuple(update_out),
            travels_in=self.travels_in,
            travels_out=self.travels_out,
            gathered=is_replicated(storage),
            numel_per_rank=self.numel_per_rank,
            divided=self.divided,
        )


def limit_for_owners(numels: list[tuple[int, ...]], limit: int) -> int:
    """``limit``, or twice the largest number of elements of a rank where matrices are large.

    That is room for a whole matrix on every one of N owners and an N-th of each on every rank, so that all owners
    compute at the same time instead of one after the other.
    """
    return max([limit, *(2 * max(numel) for numel in numels)])


def fill_buckets(numels: list[tuple[int, ...]], limit: int) -> list[list[int]]:
    """Group items so that no rank has more than ``limit`` elements in a bucket (single items may), by least increase.

    Model order fills buckets badly: neighbours fall on the same ranks. Items keep their order within a bucket.
    """
    buckets: list[tuple[list[int], list[int]]] = []
    for item in sorted(range(len(numels)), key=lambda i: (-max(numels[i]), i)):
        best: tuple[int, int] | None = None
        for number, (_, total) in enumerate(buckets):
            peak = max(map(add, total, numels[item]))
            if peak <= limit and (best is None or peak - max(total) < best[0]):
                best = (peak - max(total), number)
        if best is None:
            buckets.append(([item], list(numels[item])))
        else:
            members, total = buckets[best[1]]
            members.append(item)
            buckets[best[1]] = (members, list(map(add, total, numels[item])))
    return [sorted(members) for members, _ in buckets]
