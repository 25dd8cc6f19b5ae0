"""Disks that give trouble: a full one, and one that cannot be written to. Real ones where the machine lets us mount."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from frugal_dist.checkpoint import disk

SIZE = 4 * 2**20
Disk = tuple[Path, Callable[[], None]]
"""A folder, and what makes it give trouble."""


@contextmanager
def disk_that_fills_up(folder: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> Iterator[Disk]:
    """``room``: bytes that are left once it is full."""
    folder.mkdir()
    if not can_mount():
        yield folder, lambda: _fail_writes(monkeypatch, errno.ENOSPC, room)
        return
    with _mounted(folder):
        yield folder, lambda: _fill(folder, room)


@contextmanager
def disk_that_turns_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """As after an error of the hardware."""
    folder.mkdir()
    if not can_mount():
        yield folder, lambda: _fail_writes(monkeypatch, errno.EROFS, 0)
        return
    with _mounted(folder):
        yield folder, lambda: _run("mount", "-o", "remount,ro", str(folder))


@cache
def can_mount() -> bool:
    """Containers often have root and no right to mount."""
    return (
        os.geteuid() == 0
        and not subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
        ).returncode
    )


@contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    _run("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder))
    try:
        yield
    finally:
        _run("umount", "--lazy", str(folder))


def _fill(folder: Path, room: int) -> None:
    stats = os.statvfs(folder)
    (folder / "ballast").write_bytes(bytes(stats.f_bavail * stats.f_frsize - room))


def _fail_writes(monkeypatch: pytest.MonkeyPatch, code: int, room: int) -> None:
    written = 0
    write = disk.Output.write

    def failing(self: disk.Output, data: bytes | memoryview) -> int:
        nonlocal written
        written += len(data)
        if written > room:
            raise OSError(code, os.strerror(code), self._path)
        return write(self, data)

    monkeypatch.setattr(disk.Output, "write", failing)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
