"""Metrics of a run: one JSON object a line, written by rank 0 and readable while the run goes on.

Beside the file, TensorBoard, Weights & Biases and a file for Prometheus, where a recipe asks for them: trouble with one
never ends a training.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from frugal_dist.checkpoint.disk import whole_file

METRICS_FILE = "metrics.jsonl"
PROMETHEUS_FILE = "metrics.prom"
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""That trackers need."""
ENDS = ("summary", "diverged")
"""Kinds of the record with which a run ends, well or not."""


class MetricsLog:
    """Appends records to a file; without a path (ranks other than 0) it does nothing.

    ``after``: the run resumes after this step; what an earlier run wrote of later steps is dropped. None starts anew.
    ``also(kind, values)`` hears of every record, once it is in the file.
    """

    def __init__(
        self, path: Path | None, after: int | None = None, also: Callable[[str, dict[str, Any]], None] | None = None
    ) -> None:
        self._also = also
        resumes = path is not None and after is not None and path.is_file()
        self._known: set[tuple[str, int]] = set()
        if path and after is not None and resumes:
            self._known = {(record["kind"], record.get("step", 0)) for record in _cut(path, after)}
        self._file = path.open("a" if resumes else "w", encoding="utf-8") if path else None

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
    with whole_file(path) as file:
        file.write("".join(line for line, _ in kept).encode())
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
    """The record with which a run has ended, well or diverged; None if there is more to be done.

    The last word counts: a finished run that was resumed, for more steps, is no longer finished.
    """
    words = [record for record in records if record["kind"] in ("run", "stopped", *ENDS)]
    return words[-1] if words and words[-1]["kind"] in ENDS else None


# --- trackers ---------------------------------------------------------------------------------------------------------


@dataclass
class Tracker:
    """``add(step, stats)`` and ``close()`` of a library; ``None`` once it failed."""

    name: str
    add: Callable[[int, dict[str, float]], None] | None
    close: Callable[[], None]


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for a tracker whose package is missing; on every rank, before anything is started."""
    for name in names:
        if name in PACKAGES and not _is_installed(PACKAGES[name]):
            raise ValueError(f"trackers has {name!r}, whose package is missing: pip install 'frugal_dist[tracking]'.")


def _is_installed(package: str) -> bool:
    """A mere folder of this name in the working directory, such as W&B's own ``wandb``, is no package."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


class Trackers:
    """All trackers of a run, on rank 0. ``tell``: where trouble is told."""

    def __init__(
        self, names: Sequence[str], folder: Path, record: dict[str, Any], start: int, tell: Callable[[str], None]
    ) -> None:
        self._tell = tell
        self._all: list[Tracker] = []
        for name in names:
            try:
                self._all.append(OPEN[name](folder, record, start))
            except Exception as error:  # no network, no account: rank 0 must not leave the others alone for that
                tell(f"{name} cannot be started, the run goes on without it: {type(error).__name__}: {error}")

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        """One record of metrics: its numbers, under kind/name."""
        step = values.get("step", values.get("steps"))
        stats = {f"{kind}/{key}": float(value) for key, value in values.items() if _is_stat(key, value)}
        if step is None or not stats or kind == "run":  # settings are no curves; each library has a way for them
            return
        for tracker in self._all:
            if tracker.add is not None:
                self._try(tracker, lambda tracker=tracker: tracker.add(step, stats))  # type: ignore[misc]

    def close(self) -> None:
        """Write out what is left."""
        for tracker in self._all:
            self._try(tracker, tracker.close)

    def _try(self, tracker: Tracker, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            tracker.add, tracker.close = None, lambda: None
            self._tell(f"{tracker.name} failed, the run goes on without it: {type(error).__name__}: {error}")


def _is_stat(key: str, value: Any) -> bool:
    return key not in ("step", "steps") and isinstance(value, int | float) and not isinstance(value, bool)


def _tensorboard(folder: Path, record: dict[str, Any], start: int) -> Tracker:
    """Event files in FOLDER/tensorboard; what an earlier run wrote of later steps, of all if begun anew, is hidden."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else 0)
    writer.add_text("recipe", "".join(f"    {line}\n" for line in json.dumps(record, indent=2).splitlines()), start)
    for part in hparams(_flat(record), {"validation/loss": 0.0}):
        writer.file_writer.add_summary(part)

    def add(step: int, stats: dict[str, float]) -> None:
        for name, value in stats.items():
            writer.add_scalar(name, value, step)

    return Tracker("tensorboard", add, writer.close)


def _flat(record: dict[str, Any], before: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings by their whole name, those that are no plain value as text."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{key}.")
        elif value is not None:
            flat[before + key] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat


def identity(folder: Path, start: int) -> str:
    """Of the run in this folder, in a file there: a new one at the beginning, the same when it resumes.

    A run of which W&B knows later steps takes no earlier ones, so one that is begun anew must be another.
    """
    path = folder / "wandb.id"
    if not (start and path.is_file()):
        path.write_text(secrets.token_hex(8), encoding="ascii")
    return path.read_text(encoding="ascii")


def _wandb(folder: Path, record: dict[str, Any], start: int) -> Tracker:
    """A run of the project that WANDB_PROJECT names. It resumes as the same one after an interruption."""
    import wandb

    run: Any = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "frugal_dist"),
        name=folder.name,
        id=identity(folder, start),
        resume="allow",
        dir=str(folder),
        config=record,
        settings=wandb.Settings(silent=True),
    )
    return Tracker("wandb", lambda step, stats: run.log(stats, step=step), run.finish)


def _prometheus(folder: Path, record: dict[str, Any], start: int) -> Tracker:
    """FOLDER/metrics.prom: the latest figures in Prometheus' text format, and when they were written: a heartbeat."""
    path, latest = folder / PROMETHEUS_FILE, {"steps_asked": float(record.get("steps", 0))}
    label = json.dumps(str(folder), ensure_ascii=False)

    def add(step: int, stats: dict[str, float]) -> None:
        latest.update({**stats, "step": step, "heartbeat_seconds": time.time()})
        lines = []
        for name, value in latest.items():
            whole = "frugal_" + re.sub(r"\W", "_", name, flags=re.ASCII)
            lines += [f"# TYPE {whole} gauge", f"{whole}{{run={label}}} {value!r}"]
        with whole_file(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())

    add(start, {})
    return Tracker("prometheus", add, lambda: None)


OPEN: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "prometheus": _prometheus,
}
