"""Metrics of a run: one JSON object a line, written by rank 0 and readable while the run goes on."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends records to a file; without a path (ranks other than 0) it does nothing.

    ``after``: the run goes on after this step; what an earlier run wrote of later steps is dropped. None starts anew.
    ``also(kind, values)`` hears of every record, once it is in the file.
    """

    def __init__(
        self, path: Path | None, after: int | None = None, also: Callable[[str, dict[str, Any]], None] | None = None
    ) -> None:
        self._also = also
        goes_on = path is not None and after is not None and path.is_file()
        self._known: set[tuple[str, int]] = set()
        if path and after is not None and goes_on:
            self._known = {(record["kind"], record.get("step", 0)) for record in _cut(path, after)}
        self._file = path.open("a" if goes_on else "w", encoding="utf-8") if path else None

    def write(self, kind: str, **values: Any) -> None:
        """Write one record at once, so that a killed run keeps all it has reached. NaN and infinity become null.

        ``time``: of the clock on the wall, in UTC.
        """
        values = {key: _as_json(value) for key, value in values.items()}
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        if self._file:
            try:
                self._file.write(json.dumps({"kind": kind, **values, "time": now}, allow_nan=False) + "\n")
                self._file.flush()
            except OSError as error:  # the other ranks train on, and would wait for this one
                self._give_up(error)
        if self._also:
            self._also(kind, values)

    def knows(self, kind: str, step: int) -> bool:
        """Whether the run that this one continues wrote such a record."""
        return (kind, step) in self._known

    def _give_up(self, error: OSError) -> None:
        """No more records: what was lost of one would garble the next."""
        print(f"{METRICS_FILE} cannot be written any more: {error}", file=sys.stderr)
        with suppress(OSError):
            self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file:
            file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def _as_json(value: Any) -> Any:
    """Numbers that JSON does not have are None; also inside of dicts and lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _as_json(one) for key, one in value.items()}
    return [_as_json(one) for one in value] if isinstance(value, list | tuple) else value


def _cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the records up to a step, without a last one that was cut off; in one move, so that a kill loses none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [(line, record) for line, record in whole if record.get("step", 0) <= step]
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text("".join(line for line, _ in kept), encoding="utf-8")
    os.replace(unfinished, path)
    return [record for _, record in kept]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run, without a last one that was cut off by a kill or a full disk."""
    path = run / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{run} holds no {METRICS_FILE}; name the folder of a run.")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.strip() and line.endswith("\n")]


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The records of one kind, in order."""
    return [record for record in records if record["kind"] == kind]


def end_of(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The record with which a run has ended, well or diverged; None if there is more to be done."""
    return next((record for kind in ("summary", "diverged") for record in reversed(of_kind(records, kind))), None)
