"""What all fuzzers share: seeds from the command line, and a failure that says how to repeat it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

C = TypeVar("C")


@dataclass(frozen=True)
class Fuzz:
    """The fixture ``fuzz``. ``runs`` None: the test's own numbers, ``heavy`` says which of them."""

    first: int
    runs: int | None
    heavy: bool
    node: str

    def __call__(self, draw: Callable[[random.Random], C], check: Callable[[C], Any], *, short: int, long: int) -> None:
        """``check`` what ``draw`` makes of each seed in turn: ``short`` seeds by default, ``long`` with ``--heavy``.

        Args:
            draw: Makes a configuration, printable, a function of the generator it is given alone.
            check: Raises if that configuration does not do what it should.
            short: Number of configurations that take a few seconds.
            long: Number of configurations in a heavy run.
        """
        runs = self.runs if self.runs is not None else long if self.heavy else short
        for seed in range(self.first, self.first + runs):
            configuration = draw(random.Random(seed))
            try:
                check(configuration)
            except Exception as error:
                raise AssertionError(
                    f"{type(error).__name__}: {error}\nconfiguration: {configuration}\n"
                    f"repeat it with: python -m pytest -n 0 '{self.node}' --fuzz-seed {seed} --fuzz-runs 1"
                ) from error
