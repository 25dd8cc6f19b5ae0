"""Which tiles go into one start of a Triton kernel, and what it is told. Importing this needs triton.

A kernel takes all tiles of one kind, dtype and set of scalars, up to ``RUN`` entries: then it starts, and the GPU works
while Python goes through the next ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig
from frugal_dist.projection.coordinates import Columns, Flat, Rows
from frugal_dist.update.eightbit import Packed, values_of
from frugal_dist.update.kernels import fused
from frugal_dist.update.kernels.jobs import Noise, TileUpdate
from frugal_dist.update.kernels.tables import BLOCK, FEW, HIGH, MOST, WIDE, Entry, Tables
from frugal_dist.update.rules import STATE_FREE, STATE_FULL

RUN = 1 << 27
"""Entries after which a kernel is started: they keep an H100 busy for half a millisecond."""
_WORD = 32
_AT_ONCE = 1 << 22
"""Entries whose temporary int64 numbers are held at the same time."""
_TABLES = Tables()
_TO_NEAREST = Noise((0, 0), 0, 0)
_AS_WRITTEN = {"enable_fp_fusion": False}
"""No products and sums are joined but those that ``fused`` names, whatever a release of Triton does by itself."""


class TritonKind(NamedTuple):
    """A kernel, with what it needs to know of a tile beyond weight and gradient.

    ``lookup(job)``: addresses of INDEX and BEFORE, and COUNT. ``by_line``: rows and columns are told apart, in blocks
    of HIGH x WIDE. ``warps``: of 32 threads that share a block.
    """

    kernel: Any
    options: dict[str, Any]
    lookup: Callable[[TileUpdate], tuple[int, int, int]]
    by_line: bool = False
    warps: int = 8


def _nothing(job: TileUpdate) -> tuple[int, int, int]:
    return 0, 0, 0


def _column_slots(job: TileUpdate) -> tuple[int, int, int]:
    return _slots(job, job.weight.shape[1])


def _row_slots(job: TileUpdate) -> tuple[int, int, int]:
    return _slots(job, job.weight.shape[0])


def _slots(job: TileUpdate, lines: int) -> tuple[int, int, int]:
    """For each line its place among the selected ones, or -1."""
    selection: Any = job.selection
    memo, index = selection.memo, selection.index
    if "slots" not in memo:
        slots = torch.full((lines,), -1, dtype=torch.int32, device=index.device)
        slots[index] = torch.arange(index.numel(), dtype=torch.int32, device=index.device)
        memo["slots"] = slots
    return memo["slots"].data_ptr(), 0, index.numel()


def _bits(job: TileUpdate) -> tuple[int, int, int]:
    selection: Any = job.selection
    memo = selection.memo
    if "bits" not in memo:
        memo["bits"], memo["before"] = packed(selection.index, job.weight.numel())
    return memo["bits"].data_ptr(), memo["before"].data_ptr(), 0


def packed(index: Tensor, numel: int) -> tuple[Tensor, Tensor]:
    """A sorted flat index as one bit per entry (int32 words), and the number of selected entries before each block."""
    blocks = ceil(numel / BLOCK)
    marks = torch.zeros(blocks * BLOCK, dtype=torch.bool, device=index.device)
    for part in index.split(_AT_ONCE):
        marks[part.long()] = True
    weights = torch.ones(_WORD, dtype=torch.int64, device=index.device) << torch.arange(_WORD, device=index.device)
    parts = marks.view(-1, _WORD).split(_AT_ONCE // _WORD)
    words = torch.cat([(part * weights).sum(1).to(torch.int32) for part in parts])  # bit 31 wraps to the sign bit
    counts = marks.view(blocks, BLOCK).sum(1)
    return words, (counts.cumsum(0) - counts).to(torch.int32)


# With eight warps a thread of the mixed kernels has four entries, and an H100 has registers for 4 to 6 thousand entries
# of a multiprocessor at a time; with four warps and eight entries each it would have them for half as many threads.
_SIGN = TritonKind(fused.sign, {}, _nothing, warps=4)
_KINDS = {
    Columns: TritonKind(fused.lines, {"BY_ROW": False}, _column_slots, by_line=True),
    Rows: TritonKind(fused.lines, {"BY_ROW": True}, _row_slots, by_line=True),
    Flat: TritonKind(fused.flat, {}, _bits),
}


def kind_of(job: TileUpdate) -> TritonKind | None:
    """The kernel for a tile, None for one that is left to torch.

    They do AdamW with sign, where the tile has selected entries, and the signed step; on contiguous tensors.
    """
    config, selection = job.config, job.selection
    if not STATE_FREE[config.state_free].has_kernel or not _fit(job.weight, job.grad):
        return None
    if selection is None or job.moments[0].numel() == 0:
        return _SIGN
    kind = _KINDS.get(type(selection))
    if kind is None or not STATE_FULL[config.state_full].has_kernel or config.form.blocky:  # they know no codes
        return None
    fit = all(moment.dtype == torch.float32 and moment.is_contiguous() for moment in job.moments)
    return kind if fit else None


def _fit(weight: Tensor, grad: Tensor) -> bool:
    if not 0 < weight.numel() < 2**31:  # positions are int32
        return False
    dtypes = weight.dtype in fused.DTYPES and grad.dtype in fused.DTYPES
    # A wrapper of other tensors (torchao's float8 weights) has no memory of its own: its address is 0.
    return dtypes and all(one.is_contiguous() and one.data_ptr() != 0 for one in (weight, grad))


def _changed(*weights: Tensor) -> None:
    """Tell autograd, as torch's operations do: a backward that needs the old values must fail, not use the new ones."""
    torch.autograd.graph.increment_version(weights)


@dataclass
class _Group:
    """Tiles that start together. The jobs keep their tensors alive until then."""

    kind: TritonKind
    aligned: bool
    jobs: list[TileUpdate] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    blocks: int = 0
    total: int = 0

    def add(self, job: TileUpdate, entry: Entry) -> None:
        rows, cols = entry[6:8]
        self.jobs.append(job)
        self.entries.append(entry)
        self.begins.append(self.blocks)
        self.blocks += ceil(rows / HIGH) * ceil(cols / WIDE) if self.kind.by_line else ceil(rows / BLOCK)
        self.total += job.weight.numel()

    @property
    def full(self) -> bool:
        return self.total >= RUN or len(self.jobs) == MOST


class Launches:
    """Tiles that wait for their kernel. ``take`` them all, then ``finish``."""

    def __init__(self) -> None:
        self._groups: dict[tuple[object, ...], _Group] = {}

    def take(self, job: TileUpdate) -> bool:
        """Whether a kernel does, or has done, this tile. Its tensors must not change until ``finish``."""
        kind = kind_of(job)
        if kind is None:
            return False
        entry = _entry(kind, job)
        aligned = _aligned(kind, entry)
        weight = job.weight
        step = 0 if kind is _SIGN else job.step
        told = (weight.dtype, job.grad.dtype, weight.device, id(job.config), job.decay, step, job.noise is None)
        key = (id(kind), aligned, *told)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(kind, aligned)
        group.add(job, entry)
        if group.full:
            _start(self._groups.pop(key))
        return True

    def finish(self) -> None:
        """Start what waits."""
        while self._groups:
            _start(self._groups.popitem()[1])


def _entry(kind: TritonKind, job: TileUpdate) -> Entry:
    weight = job.weight
    first, second = (0, 0) if kind is _SIGN else (job.moments[0].data_ptr(), job.moments[1].data_ptr())
    lookup, (rows, cols) = kind.lookup(job), weight.shape
    if not kind.by_line:
        rows *= cols
    (key0, key1), start, stride = job.noise or _TO_NEAREST
    addresses = weight.data_ptr(), job.grad.data_ptr(), first, second, *lookup[:2]
    return *addresses, rows, cols, lookup[2], start, stride, key0, key1


def _aligned(kind: TritonKind, entry: Entry) -> bool:
    weight, grad, first, second, _, _, rows, cols, *_ = entry
    return (weight | grad | (first | second | cols if kind.by_line else rows)) % 16 == 0


def _start(group: _Group) -> None:
    job = group.jobs[0]
    device = job.weight.device
    with _on(device):
        table = _TABLES.of(group.begins, group.entries, device)
        group.kind.kernel[(group.blocks,)](
            table,
            *_scalars(group.kind, job.step, job.decay, job.config),
            W=fused.DTYPES[job.weight.dtype],
            G=fused.DTYPES[job.grad.dtype],
            ALIGNED=group.aligned,
            NOISE=job.noise is not None,
            num_warps=group.kind.warps,
            **_AS_WRITTEN,
            **group.kind.options,
        )
    _changed(*(job.weight for job in group.jobs))


def _scalars(kind: TritonKind, step: int, decay: float, config: FrugalConfig) -> Sequence[float]:
    rate = float(config.lr * config.projected_lr_scale)
    free = (1.0 - config.lr * decay, rate * config.state_free_lr_scale)
    return free if kind is _SIGN else (*free, *_adam(rate, step, config))


def _adam(rate: float, step: int, config: FrugalConfig) -> Sequence[float]:
    beta1, beta2 = config.beta_pair
    inverse = (1.0 - beta2**step) ** -0.5
    return rate / (1.0 - beta1**step), 1.0 - beta1, beta2, 1.0 - beta2, config.eps, inverse


def round_(target: Tensor, wide: Tensor, starts: Tensor, keys: tuple[int, int]) -> bool:
    """Write fp32 ``wide`` to bf16 ``target``, as ``stochastic_rounding`` does, in one pass.

    False, and nothing done, if the tensors are not made for it.
    """
    if not (_fit(target, wide) and (target.dtype, wide.dtype) == (torch.bfloat16, torch.float32)):
        return False
    rows = starts.numel()
    cols = target.numel() // rows
    tall = HIGH if cols < BLOCK else 1
    with _on(target.device):
        blocks = ceil(rows / tall) * ceil(cols / (BLOCK // tall))
        fused.round_rows[(blocks,)](target, wide, starts, rows, cols, *map(_int32, keys), TALL=tall, **_AS_WRITTEN)
    _changed(target)
    return True


def sign_step_(weight: Tensor, grad: Tensor, size: float, keep: float = 1.0) -> bool:
    """W <- keep W - size sign(G) at once, for a gradient that will not live until others have come.

    False, and nothing done, if the tensors are not made for it.
    """
    if not _fit(weight, grad):
        return False
    with _on(weight.device):
        fused.sign_one[(ceil(weight.numel() / BLOCK),)](weight, grad, weight.numel(), keep, size, **_AS_WRITTEN)
    _changed(weight)
    return True


def sign_steps_(weights: Sequence[Tensor], grads: Sequence[Tensor], config: FrugalConfig, decay: float) -> bool:
    """The state-free step of several matrices. False, and nothing done, if the tensors are not made for it."""
    jobs = [TileUpdate(*pair, None, (), 0, decay, config) for pair in zip(weights, grads, strict=True)]
    if any(kind_of(job) is None for job in jobs):
        return False
    launches = Launches()
    for job in jobs:
        launches.take(job)
    launches.finish()
    return True


def sign_step_above_(weight: Tensor, rest: Tensor, grad: Tensor, size: float, keep: float, threshold: float) -> bool:
    """The same by those rows of the residual whose norm is above ``threshold`` times the gradient's; all in fp32."""
    tensors = (weight, rest, grad)
    if not (_fit(weight, grad) and rest.is_contiguous()) or any(one.dtype != torch.float32 for one in tensors):
        return False
    with _on(weight.device):
        fused.sign_above[(len(weight),)](*tensors, weight.shape[1], keep, size, threshold, **_AS_WRITTEN)
    _changed(weight)
    return True


def step_codes_(params: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Sequence[Packed]], step: int,
                lr: float, decay: float, config: FrugalConfig) -> bool:  # fmt: skip
    """AdamW with moments in 8 bits, one pass over each parameter.

    False, and nothing done, if the tensors are not made for it.
    """
    pieces = [one for one in zip(params, grads, moments, strict=True) if one[0].numel()]
    if not all(_fit(param, grad) and all(map(_fits, own)) for param, grad, own in pieces):
        return False
    scalars = (1.0 - lr * decay, *_adam(lr, step, config))
    for param, grad, (first, second) in pieces:
        (rows, across), width, phase = first.scales.shape, first.codes.shape[1], first.phase
        numbers = [values_of(moment.signed, torch.float32, param.device)[:2] for moment in (first, second)]
        addresses = [one.data_ptr() for one in (param, grad, first.codes, second.codes)]
        with _on(param.device):
            fused.coded[(ceil(rows * across / FEW),)](
                param, grad, *first[:2], *second[:2], *numbers[0], *numbers[1], width, phase, across, rows * across,
                *scalars, ALIGNED=all(one % 16 == 0 for one in (*addresses, width, phase)), **_AS_WRITTEN,
            )  # fmt: skip
        _changed(param)
    return True


def _fits(moment: Packed) -> bool:
    return moment.scales.dtype == torch.float32 and moment.codes.is_contiguous() and moment.scales.is_contiguous()


def _int32(key: int) -> int:
    return key - (1 << 32) if key >= 1 << 31 else key


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
