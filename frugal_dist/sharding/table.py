"""The table everything stands on: for every matrix its tiles on every rank, exchanged once and verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from frugal_dist.sharding.collectives import Ranks, gather_objects
from frugal_dist.sharding.placement import assign_owners, refresh_cost
from frugal_dist.sharding.shard import ParamSpec, Storage
from frugal_dist.sharding.tile import Holders, Layout, check_cover, elements, holders, is_replicated


@dataclass(frozen=True)
class Matrix:
    """One projected matrix: a 2-D parameter, or one member of a 3-D stack of expert weights.

    ``index`` counts over all matrices; ``block`` is its position among the ``blocks`` matrices of its group.
    """

    name: str
    original: int
    member: int
    rows: int
    cols: int
    index: int
    block: int
    blocks: int
    storage: Layout
    owner: int

    @cached_property
    def empty(self) -> bool:
        """Whether it has no entries at all."""
        return self.rows * self.cols == 0

    @cached_property
    def held(self) -> Holders:
        """Every tile with the ranks that hold it."""
        return holders(self.storage)

    @cached_property
    def copies(self) -> int:
        """How many ranks hold each element."""
        return len(next(iter(self.held.values()), (0,)))

    @cached_property
    def replicated(self) -> bool:
        """Whether every rank holds everything."""
        return is_replicated(self.storage)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many elements each rank holds."""
        return tuple(elements(tiles) for tiles in self.storage)


@dataclass(frozen=True)
class Table:
    """All matrices in order, and the regular parameters' positions."""

    matrices: tuple[Matrix, ...]
    regular: tuple[int, ...]


def build_table(
    ranks: Ranks,
    originals: Sequence[ParamSpec],
    given: Sequence[ParamSpec],
    storage: Storage,
    options: Mapping[str, object],
    problem: str,
    owners: Sequence[int] = (),
) -> Table:
    """Exchange every rank's description, check that all agree, and lay out the matrices.

    ``originals`` are what the engine optimizes, of all that were ``given``: ZeRO drops frozen parameters and a pipeline
    stage has some layers, but blocks are counted over all matrices: every engine makes the same ones state-full.
    ``options`` must be equal on all ranks (hyperparameters); ``problem`` a local error text, "" if none; ``owners``
    those of the first matrices, where they are given already. Raises ValueError on all ranks alike, whichever rank has
    the trouble.
    """
    mine = _describe(originals, storage, options, problem)
    everyone = gather_objects(ranks, mine)
    _check_agreement(everyone)
    sizes = _matrix_list(originals)
    owners = group_owners(originals, ranks.size, owners)
    numbers = number_blocks(given)
    matrices = []
    for index, (i, member, rows, cols) in enumerate(sizes):
        name = originals[i].name if originals[i].stack == 1 else f"{originals[i].name}[{member}]"
        layout: Layout = tuple(description["tiles"][index] for description in everyone)
        check_cover(name, layout, rows, cols)
        block, blocks = _number(numbers, originals[i].name, member)
        matrices.append(Matrix(name, i, member, rows, cols, index, block, blocks, layout, owners[index]))
    return Table(tuple(matrices), tuple(i for i, original in enumerate(originals) if not original.projected))


def group_owners(originals: Sequence[ParamSpec], ranks: int, known: Sequence[int] = ()) -> list[int]:
    """The owner of every matrix, one group after the other: a group that is added later changes no other's owners, so
    that a program that builds all groups at once finds the state where it was saved.

    ``known``: owners that the first matrices have already.
    """
    owners, costs = list(known), []
    for _, members in groupby(originals, key=lambda original: original.group):
        costs += [refresh_cost(rows, cols) for _, _, rows, cols in _matrix_list(list(members))]
        owners = assign_owners(costs, ranks, owners) if len(costs) > len(owners) else owners
    return owners


def number_blocks(originals: Sequence[ParamSpec]) -> dict[tuple[str, int], tuple[int, int]]:
    """For every matrix, by parameter name and member, its position in its group and how many the group has."""
    groups: dict[int, list[tuple[str, int]]] = {}
    for i, member, _, _ in _matrix_list(originals):
        groups.setdefault(originals[i].group, []).append((originals[i].name, member))
    return {key: (position, len(keys)) for keys in groups.values() for position, key in enumerate(keys)}


def _number(numbers: Mapping[tuple[str, int], tuple[int, int]], name: str, member: int) -> tuple[int, int]:
    if (name, member) not in numbers:
        raise ValueError(f"{name} is not among the projected parameters of whole_model. Give those of the whole model.")
    return numbers[name, member]


def _matrix_list(originals: Sequence[ParamSpec]) -> list[tuple[int, int, int, int]]:
    """(parameter, member, rows, cols) of every matrix, in the order of groups and parameters."""
    return [
        (i, member, *original.matrix_shape)
        for i, original in enumerate(originals)
        if original.projected
        for member in range(original.stack)
    ]


def _describe(
    originals: Sequence[ParamSpec], storage: Storage, options: Mapping[str, object], problem: str
) -> dict[str, Any]:
    tiles = []
    if not problem:
        try:
            for i, member, _, _ in _matrix_list(originals):
                tiles.append(storage.part(i).tiles(originals[i], member))
        except ValueError as error:
            problem = str(error)
    return {"problem": problem, "originals": list(originals), "options": options, "tiles": tiles}


def _check_agreement(everyone: Sequence[dict[str, Any]]) -> None:
    for rank, other in enumerate(everyone):
        if other["problem"]:
            raise ValueError(other["problem"] if len(everyone) == 1 else f"rank {rank}: {other['problem']}")
    first = everyone[0]
    for rank, other in enumerate(everyone):
        if len(other["originals"]) != len(first["originals"]):
            raise ValueError(
                f"rank 0 optimizes {len(first['originals'])} parameters, rank {rank} {len(other['originals'])}. "
                "All ranks must build the same model and the same parameter groups. Pipeline stages of ordinary "
                "tensors need process_group= the ranks of the stage."
            )
        for mine, theirs in zip(first["originals"], other["originals"], strict=True):
            if mine != theirs:
                raise ValueError(
                    f"rank 0 and rank {rank} disagree about a parameter: {mine.name} {mine.shape} (projected="
                    f"{mine.projected}, group {mine.group}) against {theirs.name} {theirs.shape} (projected="
                    f"{theirs.projected}, group {theirs.group}). Names, shapes and order must be equal on all ranks."
                )
        apart = _differences(first["options"], other["options"])
        if apart:
            raise ValueError(
                f"rank 0 and rank {rank} have different hyperparameters: {apart}. Give every rank the same ones, the "
                "seed included."
            )


def _differences(first: Mapping[str, object], other: Mapping[str, object]) -> str:
    keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
    return "; ".join(f"{key}: {first.get(key)!r} against {other.get(key)!r}" for key in keys)
