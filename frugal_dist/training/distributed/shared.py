"""Whether all ranks have the same folder before them: checkpoints are written by all of them together."""

from __future__ import annotations

import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

from frugal_dist.training.distributed.ranks import together

PATIENCE = 10.0
"""Seconds that a network file system gets to show rank 0's new file to the other ranks."""


def check_shared(folder: Path, rank: int) -> None:
    """Called by all ranks. ValueError on each host that does not see what rank 0 writes in this folder."""
    from frugal_dist.training.engines.collectives import gathered

    own = folder / f".seen-by-all-{secrets.token_hex(8)}"
    try:
        together(lambda: own.touch() if rank == 0 else None)
        name = gathered(own.name)[0]
        together(lambda: _wait_for(folder / name))
    finally:
        if rank == 0:
            with suppress(OSError):
                own.unlink(missing_ok=True)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{path.parent} on {socket.gethostname()} is not the folder in which rank 0 writes, so no checkpoint "
                "could be saved: choose a --folder on a file system that all hosts share."
            )
        time.sleep(0.1)
