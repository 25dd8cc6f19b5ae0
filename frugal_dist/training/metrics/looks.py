"""How runs look in pictures: no two alike, told apart by colour, line and marker; seeds of one run together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from frugal_dist.training.metrics.record import of_kind

Record = dict[str, Any]
Runs = dict[str, list[Record]]
"""Records by the run's name."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart; without yellow, which is pale on white."""
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*")
_OF_ITSELF = ("kind", "seed", "folder", "start", "ranks", "host", "device", "time", "version", "versions", "commit")
"""What a record says of a run that may differ between seeds."""


@dataclass(frozen=True)
class Look:
    """Colour, line and marker: 252 of them before one comes again."""

    number: int

    @property
    def colour(self) -> str:
        return COLOURS[self.number % len(COLOURS)]

    @property
    def line(self) -> Any:
        return LINES[self.number % len(LINES)]

    @property
    def marker(self) -> str:
        return MARKERS[self.number % len(MARKERS)]


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed, drawn as one; most often a single run."""

    name: str
    look: Look
    seeds: list[list[Record]]

    @property
    def first(self) -> list[Record]:
        return self.seeds[0]

    def rows(self, kind: str) -> Iterator[list[Record]]:
        """The records of a kind, seed by seed."""
        return (of_kind(records, kind) for records in self.seeds)


def grouped(runs: Runs) -> list[Group]:
    """In the order in which they were given."""
    found: dict[str, dict[str, list[Record]]] = {}
    for name, records in runs.items():
        found.setdefault(_setting(name, records), {})[name] = records
    return [
        Group(_common_name(list(members)), Look(number), list(members.values()))
        for number, members in enumerate(found.values())
    ]


def _setting(name: str, records: list[Record]) -> str:
    """What seeds of one run have in common; a run that does not say its seed is alone."""
    begun = of_kind(records, "run")
    if not begun or "seed" not in begun[-1] or "folder" not in begun[-1]:
        return name
    kept = {key: value for key, value in begun[-1].items() if key not in _OF_ITSELF}
    return json.dumps([_without_seed(name), kept], sort_keys=True)


def _common_name(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{_without_seed(names[0])}, {len(names)} seeds"


def _without_seed(name: str) -> str:
    return re.sub(r"[-_ ]?seed[-_ ]?\d+$", "", name) or name
