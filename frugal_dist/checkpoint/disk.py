"""Single files of a checkpoint: written with their checksum and flushed; opened whatever lies in their place."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from frugal_dist.checkpoint.errors import CheckpointError, DamagedError, StorageError

BLOCK = 16 * 2**20
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


# --- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """Size and checksum of a file, as its writer saw them go by."""

    bytes: int
    crc32: int


class Output:
    """A file that counts what it writes and reaches the disk before it closes."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._file: BinaryIO = path.open("wb")
        self._size, self._crc = 0, 0

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # after `finish` nothing is left to write; before it something has failed
            self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        """Write all of ``data``."""
        view = memoryview(data).cast("B")
        with self._naming_itself():
            for start in range(0, len(view), BLOCK):
                block = view[start : start + BLOCK]
                self._file.write(block)
                self._crc = zlib.crc32(block, self._crc)
        self._size += len(view)
        return len(view)

    def finish(self) -> Written:
        """Flush to disk."""
        with self._naming_itself():
            self._file.flush()
            os.fsync(self._file.fileno())
        return Written(self._size, self._crc)

    @contextlib.contextmanager
    def _naming_itself(self) -> Iterator[None]:
        """The system's error about a full disk does not say which file it was."""
        try:
            yield
        except OSError as error:
            error.filename = self._path
            raise


def write_bytes(path: Path, data: bytes) -> Written:
    """Write a file and flush it to disk."""
    with Output(path) as output:
        output.write(data)
        return output.finish()


def flush_folder(folder: Path) -> None:
    """Names reach the disk too; some file systems cannot, and need not."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name at the end: it is there as a whole or not at all, also after a power cut."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def appears(path: Path, seconds: float) -> bool:
    """Whether a name that another rank has just made is there within so many seconds: network file systems are late."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


# --- reading --------------------------------------------------------------------------------------


class MissingError(DamagedError):
    """There is no such file."""


@contextlib.contextmanager
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


def checksum(path: Path) -> int:
    """CRC-32 of a whole file."""
    with opened(path) as file:
        return checksum_of(file)


def checksum_of(file: BinaryIO) -> int:
    """CRC-32 of what is left to be read of a file."""
    crc = 0
    while block := file.read(BLOCK):
        crc = zlib.crc32(block, crc)
    return crc
