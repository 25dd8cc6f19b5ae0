"""The route of one basis matrix on one rank: compute tiles, where gradients come from, where updates go."""

from __future__ import annotations

from dataclasses import dataclass

from frugal_dist.sharding.plan import Move, moves_for
from frugal_dist.sharding.tile import Layout, Tile, elements, holders, is_replicated, owned


@dataclass(frozen=True)
class Route:
    """``home`` is the local storage tile that contains a compute tile; ``in_place`` says that nobody else holds it.

    ``gradient_in`` and ``update_out`` list this rank's moves, its own copies included; ``travels_*`` say whether any
    rank moves anything, which all ranks answer alike. ``gathered``: every rank holds everything, so updates go to all.
    """

    layout: Layout
    tiles: tuple[Tile, ...]
    home: tuple[Tile | None, ...]
    in_place: tuple[bool, ...]
    gradient_in: tuple[Move, ...]
    update_out: tuple[Move, ...]
    travels_in: bool
    travels_out: bool
    gathered: bool
    load: tuple[int, ...]


def route(storage: Layout, compute: Layout, rank: int, index: int) -> Route:
    """Pure: a function of the two layouts. ``index`` spreads replicated sources over their holders."""
    mine = compute[rank]
    if storage == compute:  # one process, or replicas that compute everything everywhere
        return Route(compute, mine, mine, (True,) * len(mine), (), (), False, False, False, (0,) * len(storage))
    held = holders(storage)
    home = tuple(owned(storage[rank], tile) for tile in mine)
    in_place = tuple(outer is not None and len(held[outer]) == 1 for outer in home)
    foreign = {tile for tile, outer in zip(mine, home, strict=True) if outer is None}
    remote = {tile for tile, place in zip(mine, in_place, strict=True) if not place}
    gradient_in = [m for m in moves_for(storage, compute, rank, index) if m.target != rank or m.target_tile in foreign]
    update_out = [m for m in moves_for(compute, storage, rank, index) if m.source != rank or m.source_tile in remote]
    return Route(
        layout=compute,
        tiles=mine,
        home=home,
        in_place=in_place,
        gradient_in=tuple(m for m in gradient_in if m.source != m.target or m.target_tile in foreign),
        update_out=tuple(update_out),
        travels_in=any(owned(storage[k], tile) is None for k, tiles in enumerate(compute) for tile in tiles),
        travels_out=any(
            (outer := owned(storage[k], tile)) is None or len(held[outer]) > 1
            for k, tiles in enumerate(compute)
            for tile in tiles
        ),
        gathered=is_replicated(storage),
        load=tuple(elements(storage[k]) + elements(compute[k]) for k in range(len(storage))),
    )


def limit_for_owners(loads: list[tuple[int, ...]], limit: int) -> int:
    """``limit``, or twice the largest load where matrices are large.

    That is room for a whole matrix on every one of N owners and an N-th of each on every rank, so that all owners
    compute at the same time instead of one after the other.
    """
    return max([limit, *(2 * max(load) for load in loads)])


def fill_buckets(loads: list[tuple[int, ...]], limit: int) -> list[list[int]]:
    """Group items so that no rank's load in a bucket exceeds ``limit`` elements (single items may), by least increase.

    Model order fills buckets badly: neighbours load the same ranks. Items keep their order within a bucket.
    """
    buckets: list[tuple[list[int], list[int]]] = []
    for item in sorted(range(len(loads)), key=lambda i: (-max(loads[i]), i)):
        best: tuple[int, int] | None = None
        for number, (_, total) in enumerate(buckets):
            peak = max(a + b for a, b in zip(total, loads[item], strict=True))
            if peak <= limit and (best is None or peak - max(total) < best[0]):
                best = (peak - max(total), number)
        if best is None:
            buckets.append(([item], list(loads[item])))
        else:
            members, total = buckets[best[1]]
            members.append(item)
            buckets[best[1]] = (members, [a + b for a, b in zip(total, loads[item], strict=True)])
    return [sorted(members) for members, _ in buckets]
