"""Progress on rank 0: a bar on a terminal, lines in a log file: the first figures, the last, every 15 s in between."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

_FORMS = {
    100: "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed} gone, {remaining} left{postfix}",
    0: "{n_fmt}/{total_fmt}, {remaining} left{postfix}",
}
"""By the columns that a form needs at least: figures are worth more than the bar."""
_SHORT = 60
"""Below so many columns there is the loss only."""
_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Shows how far a training is, its loss, its speed and the time left."""

    def __init__(self, total: int, terminal: TextIO, shown: bool, before: int = 0) -> None:
        """``before``: steps of ``total`` that are done when it starts."""
        self.total = total
        self.before = before
        self.terminal = terminal
        self.shown = shown
        self._lines = shown and not terminal.isatty()
        self._last_line: float | None = None
        self._bar: tqdm[None] = tqdm(
            total=total,
            file=terminal,
            disable=not shown or self._lines,
            mininterval=0.5,
            bar_format=next(form for least, form in _FORMS.items() if self._columns() >= least),
            dynamic_ncols=True,
        )
        self._start = time.monotonic()
        self._done = 0

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self.terminal.fileno()).columns or 80
        except (OSError, ValueError):  # no terminal
            return 80

    def start(self) -> None:
        """Training begins: the clock behind the time left starts here, not while loading and evaluating."""
        self._bar.reset()
        self._bar.initial = self._bar.n = self.before
        self._start = time.monotonic()

    def step(self) -> None:
        """One more step is done."""
        self._done += 1
        with suppress(OSError):
            self._bar.update()

    def figures(self, loss: float, tokens_per_second: float) -> None:
        """New figures to show beside the bar; in a log a line of the first, the last, and now and then one between."""
        text = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
        self._bar.set_postfix_str(text if self._columns() >= _SHORT else f"loss {loss:.3f}", refresh=False)
        now = time.monotonic()
        done = self.before + self._done
        due = self._last_line is None or done == self.total or now - self._last_line >= _SECONDS_BETWEEN_LINES
        if self._lines and self._done and due:
            self._last_line = now
            left = (now - self._start) / self._done * (self.total - done)
            self.say(f"step {done:>5}/{self.total}: {text}, {tqdm.format_interval(left)} left")

    def finish(self) -> None:
        """The bar stays where it is: what is said from here on comes below it."""
        with suppress(OSError):
            self._bar.close()

    def say(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self.shown:
            with suppress(OSError):  # a terminal that is gone must not end rank 0 while the others train on
                tqdm.write(line, file=self.terminal)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._bar.close()
