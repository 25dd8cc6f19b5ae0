"""TensorBoard and Weights & Biases, beside the metrics file. Trouble with one never ends a training."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


@dataclass
class Tracker:
    """``add(step, figures)`` and ``close()`` of a library; ``None`` once it failed."""

    name: str
    add: Callable[[int, dict[str, float]], None] | None
    close: Callable[[], None]


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for a tracker whose package is missing; on every rank, before anything is started."""
    for name in names:
        if not _is_installed(PACKAGES[name]):
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
        figures = {f"{kind}/{key}": float(value) for key, value in values.items() if _is_figure(key, value)}
        if step is None or not figures or kind == "run":  # settings are no curves; each library has a way for them
            return
        for tracker in self._all:
            if tracker.add is not None:
                self._try(tracker, lambda tracker=tracker: tracker.add(step, figures))  # type: ignore[misc]

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


def _is_figure(key: str, value: Any) -> bool:
    return key not in ("step", "steps") and isinstance(value, int | float) and not isinstance(value, bool)


def _tensorboard(folder: Path, record: dict[str, Any], start: int) -> Tracker:
    """Event files in FOLDER/tensorboard; what an earlier run wrote of later steps, of all if begun anew, is hidden."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else 0)
    writer.add_text("recipe", "".join(f"    {line}\n" for line in json.dumps(record, indent=2).splitlines()), start)
    for part in hparams(_flat(record), {"validation/loss": 0.0}):
        writer.file_writer.add_summary(part)

    def add(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
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
    """Of the run in this folder, in a file there: a new one at the beginning, the same when it goes on.

    A run of which W&B knows later steps takes no earlier ones, so one that is begun anew must be another.
    """
    path = folder / "wandb.id"
    if not (start and path.is_file()):
        path.write_text(secrets.token_hex(8), encoding="ascii")
    return path.read_text(encoding="ascii")


def _wandb(folder: Path, record: dict[str, Any], start: int) -> Tracker:
    """A run of the project that WANDB_PROJECT names. It goes on as the same one after an interruption."""
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
    return Tracker("wandb", lambda step, figures: run.log(figures, step=step), run.finish)


OPEN: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {"tensorboard": _tensorboard, "wandb": _wandb}
