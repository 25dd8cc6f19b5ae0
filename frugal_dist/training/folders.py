"""Folders that commands are given: a run's, its checkpoints', or one checkpoint; and what lies where in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frugal_dist import checkpoint
from frugal_dist.checkpoint.folder import LATEST
from frugal_dist.checkpoint.index import INDEX
from frugal_dist.training.metrics.record import METRICS_FILE, of_kind, read_metrics

CHECKPOINTS = "checkpoints"
"""Of a run, in its folder."""


def checkpoint_in(path: Path) -> Path:
    """The checkpoint that is meant by itself, by the folder of checkpoints it is the latest of, or by its run."""
    if path.is_file() and path.name in (METRICS_FILE, INDEX, LATEST):
        path = path.parent  # whose file it is
    if (path / INDEX).exists():
        return path
    folder = checkpoint.latest(path) or checkpoint.latest(path / CHECKPOINTS) or path
    runs = [] if folder != path else [run.name for run in _runs_within(path)]
    if runs:
        raise ValueError(f"{path} holds the runs {', '.join(runs[:5])}{', ...' if runs[5:] else ''}; name one of them.")
    return folder


def run_of(path: Path) -> Path | None:
    """The run's folder, from itself, its checkpoints or one of them; None if no run lies there."""
    if not path.exists():
        return None
    places = (path, *path.absolute().parents[:2])
    return next((place for place in places if (place / METRICS_FILE).is_file()), None)


def runs_in(path: Path) -> list[Path]:
    """The run that is meant, or all runs in a folder of them, such as a comparison's. ValueError if there is none."""
    within = _runs_within(path)
    own = run_of(path) if not within or (path / METRICS_FILE).is_file() else None
    if own is None and not within:
        raise ValueError(
            f"{path} holds no {METRICS_FILE}; name the folder of a run, its checkpoints, or a folder of runs."
        )
    return within if own is None else [own]


def _runs_within(path: Path) -> list[Path]:
    return sorted(file.parent for file in path.glob(f"*/{METRICS_FILE}"))


def tokenizer_of(run: Path) -> str | None:
    """The tokenizer that a run was trained with: a folder, a file or a name on the hub; None if it names none."""
    try:
        records = of_kind(read_metrics(run), "run")
    except (OSError, ValueError):  # cut off or garbled: the export does without
        return None
    return _tokenizer(records[-1]) if records else None


def _tokenizer(record: dict[str, Any]) -> str | None:
    data, model = record.get("data"), record.get("model")
    if not isinstance(data, dict):
        return None
    if "kind" not in data:  # a classifier's is its model's
        return model.get("path") if isinstance(model, dict) else None
    source = data.get("path") if data["kind"] == "tokens" else data.get("tokenizer")
    return source if isinstance(source, str) else None


def give_ordinary_permissions(folder: Path) -> None:
    """Those that the user's umask asks for: some libraries write files that only their owner can read."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
