"""The runs that are compared: matrices of odd shapes, their gradients, the settings, and the layouts to run them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from storages import Groups, Held, Named, Replicate, Shard, dtensors, flats, replicas
from torch import Tensor

from frugal_dist.config import FrugalConfig
from frugal_dist.projection.registry import selection_size

STEPS, GAP = 7, 3
MATRICES: dict[str, tuple[int, ...]] = {
    "tall": (24, 16),
    "wide": (16, 40),
    "small": (7, 5),
    "square": (33, 33),
    "row": (1, 9),
    "high": (101, 48),
    "broad": (48, 101),
    "experts": (3, 10, 6),
}
REGULAR: dict[str, tuple[int, ...]] = {"norm": (11,), "embedding": (7, 5), "scale": (1,)}
PROJECTIONS = (
    ("svd", "std"),
    ("svd", "right"),
    ("svd", "left"),
    ("svd", "full"),
    ("random", "std"),
    ("dct", "std"),
    ("randperm", "std"),
    ("columns", "std"),
    ("rows", "std"),
    ("randk", "std"),
    ("blockwise", "std"),
)
STATE_FREE = ("sign", "sgd", "none")
ON_REFRESH = ("reset", "keep", "project")
DENSITIES = (0.25, 0.5, 0.6, 0.1, 1.0)
"""A 1x9 matrix has no quarter of its rows."""


def label(projection: str, side: str) -> str:
    return projection if projection != "svd" else f"svd {side}"


# --- layouts ---------------------------------------------------------------------------------------

Build = Callable[[Named, Groups, dict[str, Any]], Held]


def _unshared(weights: Named, groups: Groups, options: dict[str, Any]) -> Held:
    return replicas(weights, groups, {**options, "shard_state": False})


def _on_mesh(shape: Callable[[], tuple[int, ...]], *placements: Any) -> Build:
    return lambda weights, groups, options: dtensors(weights, groups, options, shape(), placements)


def _all() -> tuple[int, ...]:
    return (torch.distributed.get_world_size(),)


LAYOUTS: dict[str, Build] = {
    "replicas": _unshared,
    "replicas, shared state": replicas,
    "Shard(0)": _on_mesh(_all, Shard(0)),
    "Shard(1)": _on_mesh(_all, Shard(1)),
    "HSDP 2x2": _on_mesh(lambda: (2, 2), Replicate(), Shard(0)),
    "ZeRO-1/2": lambda w, g, o: flats(w, g, o, 1, False),
    "ZeRO-1/2, 3 sub-groups": lambda w, g, o: flats(w, g, o, 3, False),
    "ZeRO-3": lambda w, g, o: flats(w, g, o, 1, True),
    "ZeRO-3, 4 sub-groups": lambda w, g, o: flats(w, g, o, 4, True),
}


def places() -> Iterator[tuple[str, int]]:
    """Every layout with every number of ranks it is tested on."""
    for layout in LAYOUTS:
        yield from ((layout, ranks) for ranks in ((4,) if layout.startswith("HSDP") else (2, 3, 4)))


# --- settings --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One setting. The state-free rules take turns over the matrices, ``turn`` says who starts; ``free`` is for all.

    ``densities``: the first that a projection allows for a shape is used. ``later``: (step, density from then on).
    """

    projection: str
    side: str
    on_refresh: str
    turn: int = 0
    more: tuple[tuple[str, Any], ...] = ()
    densities: tuple[float, ...] = DENSITIES
    free: str = ""
    names: tuple[str, ...] = tuple(MATRICES)
    later: tuple[tuple[int, float], ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        eps = 1e-3 if self.side == "full" else 1e-8
        return {"projection": self.projection, "side": self.side, "on_refresh": self.on_refresh, "update_gap": GAP,
                "lr": 1e-2, "weight_decay": 0.1, "eps": eps, **dict(self.more)}  # fmt: skip

    @property
    def tolerance(self) -> float:
        """Right after a refresh "full" turns rounding noise off the diagonal into steps."""
        return 1e-7 if self.side == "full" else 1e-10

    def state_free(self, name: str) -> str:
        """A 1x9 gradient has rank 1, so its svd leaves a residual of rounding noise, whose sign means nothing."""
        noise = name == "row" and self.projection == "svd"
        if noise or self.free:
            return "sgd" if noise else self.free
        return STATE_FREE[(self.turn + list(MATRICES).index(name)) % len(STATE_FREE)]

    def groups(self) -> list[dict[str, Any]]:
        found: dict[tuple[str, float], list[str]] = {}
        for name in self.names:
            shape = MATRICES[name]
            found.setdefault((self.state_free(name), self._density(name, shape)), []).append(name)
        projected = [
            {"params": names, "projected": True, "state_free": free, "density": density}
            for (free, density), names in found.items()
        ]
        return [*projected, {"params": list(REGULAR), "projected": False, "weight_decay": 0.01}]

    def _density(self, name: str, shape: tuple[int, ...]) -> float:
        if self.projection == "blockwise":
            return 0.5
        for density in self.densities:
            if density == 0.0:
                return density
            config = FrugalConfig(projection=self.projection, side=self.side, density=density)
            try:
                if selection_size(config, name, *shape[-2:]):
                    return density
            except ValueError:
                continue
        raise AssertionError(f"no density fits {name}")


@lru_cache
def weights(dtype: torch.dtype = torch.float64) -> Named:
    generator = torch.Generator().manual_seed(1)
    shapes = {**MATRICES, **REGULAR}
    return {n: (0.1 * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype) for n, s in shapes.items()}


@lru_cache
def gradients(dtype: torch.dtype = torch.float64, steps: int = STEPS) -> tuple[Named, ...]:
    generator = torch.Generator().manual_seed(2)
    shapes = {**MATRICES, **REGULAR}

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return tuple({name: draw(shape) for name, shape in shapes.items()} for _ in range(steps))


def train(build: Build, case: Case, dtype: torch.dtype = torch.float64) -> Named:
    """The weights after all steps."""
    start = {name: weights(dtype)[name] for name in (*case.names, *REGULAR)}
    held = build(start, case.groups(), case.options)
    for step, grads in enumerate(gradients(dtype)):
        for group in held.optimizer.param_groups[:-1] if step in dict(case.later) else ():
            group["density"] = dict(case.later)[step]
        held.step({name: grads[name] for name in start})
    return held.full()


@cache
def reference(case: Case, dtype: torch.dtype = torch.float64) -> Named:
    """The same run on one process."""
    return train(replicas, replace(case, more=(*case.more, ("process_group", None))), dtype)
