"""`frugal-dist doctor`: what works on this machine, tried out rather than believed."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any, NoReturn

from frugal_dist.training.doctor.machine import (
    FAIL,
    NOTE,
    Finding,
    deepspeed_ops,
    devices,
    disk,
    kernels,
    untouched_devices,
    versions,
)
from frugal_dist.training.doctor.trials import engines, ranks

_TOLD = 10
"""Seconds from which on it is said how many a check took."""
Check = Callable[[Path], Iterator[Finding]]


def doctor(folder: Path, quick: bool = False, as_json: bool = False) -> int:
    """Print what works, and what took seconds; ``folder`` is where runs would be written. ``quick`` leaves out what
    starts processes or takes memory on GPUs: a container's health check runs beside its training. ``as_json``: one
    object at the end, for programs.

    Returns the exit code: 0 if nothing failed, 1 otherwise.
    """
    with _ended_by_sigterm():
        return _doctor(folder, quick, as_json)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the trials, too, which run in groups of their own; they end with this process's clean-up."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _doctor(folder: Path, quick: bool, as_json: bool) -> int:
    checks: list[Check] = [versions, untouched_devices if quick else devices, disk, deepspeed_ops]
    findings: list[dict[str, Any]] = []
    for check in checks if quick else [*checks, kernels, ranks, engines]:
        started = monotonic()
        for finding in check(folder):
            seconds, started = monotonic() - started, monotonic()
            findings.append({**asdict(finding), "seconds": round(seconds, 1)})
            if not as_json:
                print(finding.line() + (f" ({seconds:.0f} s)" if seconds >= _TOLD else ""), flush=True)
    failed = sum(one["verdict"] == FAIL for one in findings)
    if as_json:
        print(json.dumps({"quick": quick, "failed": failed, "findings": findings}, indent=1))
        return int(failed > 0)
    if quick:
        print(f"{NOTE:<5} not tried with --quick: processes that talk to each other, a training on each engine")
    print(f"\n{failed} of these must be mended first." if failed else "\nAll of this works.")
    return int(failed > 0)


__all__ = ["doctor"]
