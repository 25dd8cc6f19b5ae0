"""Opening files of a checkpoint, whatever lies in their place: a folder, a pipe, nothing."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from frugal_dist.checkpoint.errors import CheckpointError, DamagedError, StorageError

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class MissingError(DamagedError):
    """There is no such file."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """An ordinary file, open for reading; it never waits, as opening a pipe does.

    DamagedError if there is none, StorageError if the system does not let it be read; both name ``path``.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise DamagedError(f"{path} is damaged: it is no ordinary file.")
        with os.fdopen(handle, "rb") as file:
            yield file
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno in _NOT_THERE:
            raise MissingError(f"{path} is missing.") from error
        if error.errno == errno.ENXIO:  # a socket
            raise DamagedError(f"{path} is damaged: it is no ordinary file.") from error
        raise StorageError(f"{path}: {error.strerror or error}") from error


def read_bytes(path: Path) -> bytes:
    """The whole of an ordinary file, see ``opened``."""
    with opened(path) as file:
        return file.read()
