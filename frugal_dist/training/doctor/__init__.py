"""`frugal-dist doctor`: what works on this machine, tried out rather than believed. Takes about a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from frugal_dist.training.doctor.finding import FAIL, NOTE, Finding
from frugal_dist.training.doctor.machine import deepspeed_ops, devices, disk, untouched_devices, versions
from frugal_dist.training.doctor.trials import engines, ranks

Check = Callable[[Path], Iterator[Finding]]


def doctor(folder: Path, quick: bool = False) -> int:
    """Print what works; ``folder`` is where runs would be written. ``quick`` leaves out what starts processes
    or takes memory on GPUs: a container's health check runs beside its training.

    Returns the exit code: 0 if nothing failed, 1 otherwise.
    """
    checks: list[Check] = [versions, untouched_devices if quick else devices, disk, deepspeed_ops]
    failed = 0
    for check in checks if quick else [*checks, ranks, engines]:
        for finding in check(folder):
            print(finding.line(), flush=True)
            failed += finding.verdict == FAIL
    if quick:
        print(f"{NOTE:<5} not tried with --quick: processes that talk to each other, a training on each engine")
    print(f"\n{failed} of these must be mended first." if failed else "\nAll of this works.")
    return int(failed > 0)


__all__ = ["doctor"]
