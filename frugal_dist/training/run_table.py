"""`frugal-dist runs`: what lies in a folder of runs, how far each has come and how good it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from frugal_dist.training.distributed.run_lock import seems_held
from frugal_dist.training.metrics.record import METRICS_FILE, end_of, of_kind, read_metrics
from frugal_dist.training.run import FAILURE_FILE

STATES = {"summary": "finished", "diverged": "diverged", "stopped": "stopped"}
"""What the last record says, if it is of one of these kinds."""
HEAD = ("run", "state", "step", "loss", "validation", "tokens/s", "last heard of")


def list_runs(folders: Sequence[Path], as_json: bool = False) -> str:
    """A table of all runs below the folders, or JSON. ValueError if there is none, or a folder is not there."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}; name one in which runs are.")
    paths = sorted({file.parent for folder in folders for file in folder.rglob(METRICS_FILE)})
    if not paths:
        raise ValueError(f"there are no runs in {', '.join(map(str, folders))}: no {METRICS_FILE} lies below it.")
    runs = [look(run) for run in paths]
    if as_json:
        return json.dumps(runs, indent=1)
    rows = [HEAD, *(_cells(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def look(run: Path) -> dict[str, Any]:
    """What a run has come to; null for what it has not, or not yet.

    ``state``: training, finished, diverged, failed (the last start ended with an error), stopped (told to, and saved),
    or interrupted (killed).
    """
    records = read_metrics(run)
    run_records, train, validation = (of_kind(records, kind)[-1:] for kind in ("run", "train", "validation"))
    asked = run_records[0].get("steps") if run_records else None  # of fine-tuning 0: as many as its epochs need
    return {
        "run": str(run),
        "state": _state(run, records),
        "step": max((record.get("step", 0) for record in records), default=0),
        "steps": asked or None,
        **{key: train[0].get(key) if train else None for key in ("loss", "tokens_per_second")},
        **{key: validation[0].get(key) if validation else None for key in ("perplexity", "score")},
        "time": records[-1].get("time") if records else None,
    }


def _state(run: Path, records: list[dict[str, Any]]) -> str:
    if seems_held(run):
        return "training"
    end = end_of(records)
    if end is None and _failed(run / FAILURE_FILE):
        return "failed"
    return STATES.get((end or (records or [{"kind": ""}])[-1])["kind"], "interrupted")


def _failed(note: Path) -> bool:
    """Whether the last start failed; one that was refused, with 2, has left the run as it was."""
    return note.is_file() and not note.read_text(encoding="utf-8").startswith("2\n")


def _cells(run: dict[str, Any]) -> tuple[str, ...]:
    measured = [f"{key} {run[key]:,.4g}" for key in ("perplexity", "score") if run[key] is not None]
    return (
        run["run"],
        run["state"],
        f"{run['step']:,}" + (f" of {run['steps']:,}" if run["steps"] else ""),
        "-" if run["loss"] is None else f"{run['loss']:.3f}",
        measured[0] if measured else "-",
        "-" if run["tokens_per_second"] is None else f"{run['tokens_per_second']:,.0f}",
        "-" if run["time"] is None else f"{datetime.fromisoformat(run['time']).astimezone():%Y-%m-%d %H:%M}",
    )
