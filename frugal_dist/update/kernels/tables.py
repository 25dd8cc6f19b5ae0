"""Tables that tell a kernel where its matrices lie: addresses and sizes, int64, on the device.

A kernel started once for each matrix would cost more time in Python than the GPU needs for the matrix.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 128
"""Matrices in a table. Kernels look through all of them at once, with a thread for each."""
BLOCK = 1024
"""Entries that a program steps."""
HIGH, WIDE = 8, 128
"""The same as rows and columns, where a program must know which they are without dividing."""
FEW = 4
"""Blocks of 8-bit moments that a program steps."""

# The rows of a table. BEGIN: the first program of the matrix. The others are what ``Entry`` has.
BEGIN, WEIGHT, GRAD, FIRST, SECOND, INDEX, BEFORE, ROWS, COLS, COUNT, START, STRIDE, KEY0, KEY1 = range(14)
Entry = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int]
"""Addresses of weight, gradient, both moments, index and ``before``; rows, columns, count; what ``jobs.Noise`` has."""

_EMPTY = array("q", [1 << 62] * MOST + [0] * 13 * MOST)
"""No program ever begins a matrix that is not there."""


class Tables:
    """The last tables, by their numbers: addresses seldom change from step to step, then nothing is sent. The keys of
    stochastic rounding do at every step: 14 KiB for each start.

    A table keeps no tensor alive. Nothing can go stale: another address or size makes another table.
    """

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[torch.device, int, bytes], Tensor] = OrderedDict()

    def of(self, begins: Sequence[int], entries: Sequence[Entry], device: torch.device) -> Tensor:
        """A table with one column for each of at most ``MOST`` entries; the host does not wait for it."""
        numbers = _numbers(begins, entries)
        # Another stream would neither wait for the copy nor keep the memory from being used again.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (device, stream, numbers.tobytes())
        table = self._kept.get(key)
        if table is None:
            host = torch.frombuffer(numbers, dtype=torch.int64)
            table = host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
            self._kept[key] = table
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
        return table


def _numbers(begins: Sequence[int], entries: Sequence[Entry]) -> array[int]:
    numbers = array("q", _EMPTY)
    for row, values in enumerate((begins, *zip(*entries, strict=True))):
        numbers[row * MOST : row * MOST + len(values)] = array("q", values)
    return numbers
