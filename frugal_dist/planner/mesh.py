"""Meshes of several axes, from shapes and names alone: tensor and expert parallelism beside FSDP2 and HSDP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from frugal_dist.sharding.shard import Box, LocalShard, ParamSpec, Span

CUT_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Layers whose outputs tensor parallelism divides ("colwise" in the words of torch and transformers)."""
CUT_BY_COLUMNS = ("o_proj", "down_proj")
"""Layers whose inputs it divides ("rowwise")."""

_FACTOR = re.compile(r"(fsdp2|hsdp|tp|ep)(?::(\d+(?:x\d+)*))?")


@dataclass(frozen=True)
class MeshSizes:
    """Ranks along each axis. ``shards`` 0: what the others leave."""

    replicas: int = 1
    shards: int = 0
    tensor: int = 1
    experts: int = 1

    def filled(self, name: str, ranks: int) -> MeshSizes:
        """With all sizes known. ValueError if they do not fit the number of ranks."""
        fixed = self.replicas * self.tensor
        shards = self.shards or ranks // fixed
        if fixed * shards != ranks:
            raise ValueError(
                f"engine {name}: {ranks} ranks are not {self.replicas} x {self.shards or 'N'} x {self.tensor}. Change "
                "--ranks or the sizes."
            )
        if ranks % self.experts:
            raise ValueError(
                f"engine {name}: {ranks} ranks do not divide into groups of {self.experts} experts' ranks."
            )
        return MeshSizes(self.replicas, shards, self.tensor, self.experts)


def read_sizes(name: str) -> MeshSizes | None:
    """``fsdp2:4xtp:2``, ``hsdp:2x4xtp:2`` (replicas x shards x tensor parallelism), ``fsdp2xep:2`` or ``ep:2``.

    None if the name is no mesh of several axes; ValueError if it is a bad one.
    """
    factors = re.split(r"x(?=[a-z])", name)
    matches = [_FACTOR.fullmatch(factor) for factor in factors]
    if not all(matches) or re.fullmatch(r"fsdp2|hsdp(:\d+)?", name):
        return None
    sizes: dict[str, list[int]] = {}
    for match in matches:
        assert match is not None
        sizes[match[1]] = [int(number) for number in (match[2] or "").split("x") if number]
    shards = sizes.get("fsdp2", [])
    hybrid = sizes.get("hsdp", [])
    each_once = len(sizes) == len(factors) and not ("fsdp2" in sizes and "hsdp" in sizes)
    if not each_once or len(shards) > 1 or ("hsdp" in sizes and len(hybrid) != 2) or 0 in shards + hybrid:
        raise ValueError(f"engine is {name!r}; write fsdp2:SHARDS or hsdp:REPLICASxSHARDS, then xtp:N or xep:N.")
    return MeshSizes(
        replicas=hybrid[0] if hybrid else 1,
        shards=(hybrid[1:] or shards or ([1] if factors[0].startswith("tp") else [0]))[0],
        tensor=_one(name, sizes.get("tp")),
        experts=_one(name, sizes.get("ep")),
    )


def _one(name: str, sizes: list[int] | None) -> int:
    if sizes is None:
        return 1
    if len(sizes) != 1 or sizes[0] < 1:
        raise ValueError(f"engine is {name!r}; tp and ep take one size each, such as tp:2.")
    return sizes[0]


def mesh_parts(sizes: MeshSizes, originals: Sequence[ParamSpec], rank: int, ranks: int) -> list[LocalShard]:
    """Each rank's part: tensor and expert parallelism cut first, FSDP2 what they leave; ranks count row by row."""
    shard = rank // sizes.tensor % sizes.shards
    parts: list[LocalShard] = []
    for original in originals:
        cuts: list[tuple[int, int, int]] = []  # (dim, parts, which)
        stacked = len(original.shape) == 3 and sizes.experts > 1
        tensor = tensor_dim(original.name, len(original.shape)) if sizes.tensor > 1 else None
        if stacked:
            experts, others = sizes.experts, ranks // sizes.experts
            cuts = [(0, experts, rank % experts), (0, others, rank // experts)]
        elif tensor is not None:
            cuts = [(tensor, sizes.tensor, rank % sizes.tensor), (0, sizes.shards, shard)]
        else:
            cuts = [(0, sizes.shards, shard)]
        parts.append(_cut(original.shape, cuts))
    return parts


def tensor_dim(name: str, dims: int) -> int | None:
    """The dim that tensor parallelism cuts of the parameter of this name; None: it leaves it whole."""
    layer, _, kind = name.rpartition(".")
    last = layer.rpartition(".")[2]
    if last in CUT_BY_ROWS:
        return max(dims - 2, 0)
    return dims - 1 if last in CUT_BY_COLUMNS and kind == "weight" else None


def _cut(shape: Sequence[int], cuts: Sequence[tuple[int, int, int]]) -> Box:
    """Cut after cut as torch.chunk does: equal parts, rounded up, the last ones short or empty."""
    spans = [(0, size) for size in shape]
    for dim, parts, which in cuts:
        spans[dim] = _chunk(spans[dim], parts, which)
    return Box(tuple(spans))


def _chunk(span: Span, parts: int, which: int) -> Span:
    start, stop = span
    share = -(-(stop - start) // parts)
    return min(start + which * share, stop), min(start + (which + 1) * share, stop)
