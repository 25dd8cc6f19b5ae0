"""The C++ kernel of CPU tensors: built once with the machine's compiler, called with addresses.

It does what ``update.step_tiles`` does for AdamW with sign, in one pass over weights and gradients instead of several:
what an offloaded optimizer spends its time on is memory. ``native.cpp`` has the arithmetic.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import struct
import subprocess
import tempfile
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig
from frugal_dist.projection.coordinates import Columns, Flat, Rows
from frugal_dist.update.kernels.jobs import TileUpdate
from frugal_dist.update.rules import STATE_FREE, STATE_FULL

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared",
         "-fPIC")  # fmt: skip
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Of weights and gradients, as the kernel numbers them."""


LINE = 1024
"""Entries that the kernel steps at a time where there are no rows."""


class NativeKind(NamedTuple):
    """What the kernel does with a tile: its number there. ``lookup(job)``: addresses of what tells which entries are
    selected, and how many before each line; and how many lines are selected.
    """

    number: int
    lookup: Callable[[TileUpdate], tuple[int, int, int]]


def _columns(job: TileUpdate) -> tuple[int, int, int]:
    selection: Any = job.selection
    memo = selection.memo
    if "columns" not in memo:
        memo["columns"] = bits_of(selection.index, job.weight.shape[1])
    return memo["columns"].data_ptr(), 0, selection.index.numel()


def _rows(job: TileUpdate) -> tuple[int, int, int]:
    selection: Any = job.selection
    memo, index = selection.memo, selection.index
    if "rows" not in memo:
        slots = torch.full((job.weight.shape[0],), -1, dtype=torch.int32)
        slots[index] = torch.arange(index.numel(), dtype=torch.int32)
        memo["rows"] = slots
    return memo["rows"].data_ptr(), 0, 0


def _entries(job: TileUpdate) -> tuple[int, int, int]:
    selection: Any = job.selection
    memo, index = selection.memo, selection.index
    if "entries" not in memo:
        numel = job.weight.numel()
        memo["entries"] = bits_of(index, numel)
        begins = torch.arange(0, numel, LINE, dtype=index.dtype)
        memo["before"] = torch.searchsorted(index, begins).to(torch.int32)
    return memo["entries"].data_ptr(), memo["before"].data_ptr(), 0


def bits_of(index: Tensor, length: int) -> Tensor:
    """A sorted index below ``length`` as one bit for each number, lowest first, in bytes; a multiple of 8 of them."""
    marks = torch.zeros(-(-length // 64) * 64, dtype=torch.uint8)
    for part in index.split(1 << 22):
        marks[part.long()] = 1
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    return (marks.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


_SIGN = NativeKind(0, lambda job: (0, 0, 0))
_SINGLE = NativeKind(3, _entries)
_KINDS = {Columns: NativeKind(1, _columns), Rows: NativeKind(2, _rows), Flat: _SINGLE}


# --- building --------------------------------------------------------------------------------------------------------


@cache
def library() -> ctypes.CDLL:
    """The kernels, built if this machine has none yet. Raises OSError or RuntimeError where that cannot be done."""
    path = _folder() / f"frugal_dist_native_{_fingerprint()}.so"
    if not path.exists():
        _build(path)
    functions = ctypes.CDLL(str(path))
    functions.frugal_step.argtypes = [
        ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_int] * 4, ctypes.c_void_p, ctypes.c_int,
    ]  # fmt: skip
    functions.frugal_round.argtypes = [
        *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2, *[ctypes.c_uint32] * 2, ctypes.c_int,
    ]  # fmt: skip
    functions.frugal_step.restype = functions.frugal_round.restype = None
    return functions


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def _folder() -> Path:
    """Where torch keeps extensions that it compiled."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(cache) if cache else Path.home() / ".cache") / "torch_extensions"


def _fingerprint() -> str:
    """Of source, flags, compiler and processor: nodes of a cluster share home folders, but not always instructions."""
    processor = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = [SOURCE.read_text(), *FLAGS, *_compiler(), processor]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build(path: Path) -> None:
    """Under a name of its own, then renamed: ranks that build at the same time do not wait for each other, and a build
    that is killed leaves no lock behind (torch's own builder does, see pytorch issue 189245).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, working = tempfile.mkstemp(prefix=".frugal_dist_native_", suffix=".so", dir=path.parent)
    except OSError:
        raise RuntimeError(f"{path.parent} cannot be written; set TORCH_EXTENSIONS_DIR to a folder that can") from None
    os.close(handle)
    native = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
    command = [*_compiler(), *FLAGS, native, str(SOURCE), "-o", working]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
        os.chmod(working, 0o755)
        os.replace(working, path)
    except FileNotFoundError:
        raise RuntimeError(f"there is no C++ compiler {command[0]!r}; install g++ or set CXX") from None
    finally:
        Path(working).unlink(missing_ok=True)


# --- stepping --------------------------------------------------------------------------------------------------------


ROW = struct.Struct("13q")
"""What the kernel is told of a tile."""


Key = tuple[int, int, float, int, torch.dtype, torch.dtype, bool]
"""What tiles of one call share: kind, settings, decay, step, dtypes, whether they are rounded to the nearest."""


def described(job: TileUpdate) -> tuple[Key, bytes] | None:
    """What a tile shares with others, and its row in the table; None for one that is left to torch.

    The kernel does AdamW with sign, where the tile has selected entries, and the signed step; on contiguous tensors
    with memory of their own (a wrapper of other tensors, such as torchao's float8 weights, has the address 0).
    """
    weight, grad, selection, moments, step, decay, config, noise, *_ = job
    dtype, of_grad = weight.dtype, grad.dtype
    if not STATE_FREE[config.state_free].has_kernel or dtype not in DTYPES or of_grad not in DTYPES:
        return None
    if not (weight.is_cpu and grad.is_cpu and weight.is_contiguous() and grad.is_contiguous()):
        return None
    address, gradient = weight.data_ptr(), grad.data_ptr()
    if address == 0 or gradient == 0:
        return None
    rows, cols = weight.shape
    keys, start, stride = noise or ((0, 0), 0, cols)
    if selection is None or moments[0].numel() == 0:
        row = ROW.pack(address, gradient, 0, 0, 0, 0, rows, cols, 0, start, stride, *keys)
        return (_SIGN.number, id(config), decay, 0, dtype, of_grad, noise is None), row
    kind = _KINDS.get(type(selection))
    if kind is None or not STATE_FULL[config.state_full].has_kernel or config.form.blocky:  # it knows no codes
        return None
    if kind is _SINGLE and stride != cols:  # that one knows no rows
        return None
    first, second = moments
    if not (first.dtype is second.dtype is torch.float32 and first.is_contiguous() and second.is_contiguous()):
        return None
    selected, before, count = kind.lookup(job)
    moved = first.data_ptr(), second.data_ptr()
    row = ROW.pack(address, gradient, *moved, selected, before, rows, cols, count, start, stride, *keys)
    return (kind.number, id(config), decay, step, dtype, of_grad, noise is None), row


def kind_of(job: TileUpdate) -> int | None:
    """The kind of a tile, None for one that is left to torch."""
    description = described(job)
    return None if description is None else description[0][0]


class Launches:
    """Tiles that wait for their call. ``take`` them all, then ``finish``."""

    def __init__(self) -> None:
        self._groups: dict[Key, tuple[list[bytes], list[TileUpdate]]] = {}

    def take(self, job: TileUpdate) -> bool:
        """Whether the kernel will do this tile. Its tensors must not change until ``finish``."""
        description = described(job)
        if description is None:
            return False
        group = self._groups.get(description[0])
        if group is None:
            group = self._groups[description[0]] = ([], [])
        group[0].append(description[1])
        group[1].append(job)  # keeps its tensors alive until then
        return True

    def finish(self) -> None:
        """Step what waits."""
        groups, self._groups = self._groups, {}
        for (number, _, decay, step, dtype, of_grads, nearest), (rows, jobs) in groups.items():
            _run(rows, number, dtype, of_grads, _scalars(number, step, decay, jobs[0].config), not nearest)
            torch.autograd.graph.increment_version([job.weight for job in jobs])


def _run(
    rows: Sequence[bytes],
    kind: int,
    weight: torch.dtype,
    grad: torch.dtype,
    scalars: array[float],
    noise: bool = False,
) -> None:
    library().frugal_step(
        b"".join(rows), len(rows), kind, DTYPES[weight], DTYPES[grad], noise,
        scalars.buffer_info()[0], torch.get_num_threads(),
    )  # fmt: skip


def _scalars(kind: int, step: int, decay: float, config: FrugalConfig) -> array[float]:
    rate = float(config.lr * config.projected_lr_scale)
    free = (1.0 - config.lr * decay, rate * config.state_free_lr_scale)
    if kind == _SIGN.number:
        return array("f", (*free, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0))
    beta1, beta2 = config.beta_pair
    inverse = (1.0 - beta2**step) ** -0.5
    return array("f", (*free, rate / (1.0 - beta1**step), beta1, 1.0 - beta1, beta2, 1.0 - beta2, config.eps, inverse))


def sign_step_(weight: Tensor, grad: Tensor, size: float, keep: float = 1.0) -> bool:
    """W <- keep W - size sign(G). False, and nothing done, if the tensors are not made for it."""
    if weight.dtype not in DTYPES or grad.dtype not in DTYPES or not (weight.is_cpu and grad.is_cpu):
        return False
    addresses = weight.data_ptr(), grad.data_ptr()
    if not (weight.is_contiguous() and grad.is_contiguous() and all(addresses)):
        return False
    numel = weight.numel()
    row = ROW.pack(*addresses, 0, 0, 0, 0, 1, numel, 0, 0, numel, 0, 0)
    _run([row], _SIGN.number, weight.dtype, grad.dtype, array("f", (keep, size, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0)))
    torch.autograd.graph.increment_version([weight])
    return True


def round_(target: Tensor, wide: Tensor, starts: Tensor, keys: tuple[int, int]) -> bool:
    """Write fp32 ``wide`` to bf16 ``target``, as ``stochastic_rounding`` does, in one pass.

    False, and nothing done, if the tensors are not made for it.
    """
    tensors = (target, wide, starts)
    if (target.dtype, wide.dtype, starts.dtype) != (torch.bfloat16, torch.float32, torch.int64):
        return False
    if not all(tensor.is_cpu and tensor.is_contiguous() and tensor.data_ptr() for tensor in tensors):
        return False
    rows = starts.numel()
    addresses = (tensor.data_ptr() for tensor in tensors)
    library().frugal_round(*addresses, rows, target.numel() // rows, *keys, torch.get_num_threads())
    torch.autograd.graph.increment_version([target])
    return True


def sign_steps_(weights: Sequence[Tensor], grads: Sequence[Tensor], config: FrugalConfig, decay: float) -> bool:
    """The state-free step of several matrices of one dtype, whose gradients share one, in one call.

    False, and nothing done, if the tensors are not made for it.
    """
    dtype, of_grads = weights[0].dtype, grads[0].dtype
    if dtype not in DTYPES or of_grads not in DTYPES:
        return False
    rows = []
    for weight, grad in zip(weights, grads, strict=True):
        address, gradient = weight.data_ptr(), grad.data_ptr()
        whole = weight.is_contiguous() and grad.is_contiguous() and weight.dtype is dtype and grad.dtype is of_grads
        if not (whole and address and gradient and weight.is_cpu and grad.is_cpu):
            return False
        height, width = weight.shape
        rows.append(ROW.pack(address, gradient, 0, 0, 0, 0, height, width, 0, 0, width, 0, 0))
    _run(rows, _SIGN.number, dtype, of_grads, _scalars(_SIGN.number, 0, decay, config))
    torch.autograd.graph.increment_version(weights)
    return True


def sign_step_above_(weight: Tensor, rest: Tensor, grad: Tensor, size: float, keep: float, threshold: float) -> bool:
    """Not here: torch's operations do it."""
    return False


def step_codes_(params: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Sequence[Any]], step: int,
                lr: float, decay: float, config: FrugalConfig) -> bool:  # fmt: skip
    """Not here: torch's operations do it."""
    return False
