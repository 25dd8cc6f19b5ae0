"""Blockwise 8-bit quantization of moments (Dettmers et al. 2022, arXiv 2110.02861), as in bitsandbytes and torchao.

``BLOCK`` consecutive entries of a row share a scale, and every entry is the number of a value between -1 and 1, or
between 0 and 1, by which the scale is multiplied. Two things are otherwise than there. The scale is the block's largest
entry with its sign: so that entry is exact, and quantizing what was dequantized changes nothing, which lets moments
travel, and be saved, as numbers. And what is above 0 among second moments stays above 0: first moments are divided by
their roots.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
DECADES = 7
"""Powers of ten that the values reach down; the upper ones have the more values."""
CODE = torch.uint8


def dynamic_values(signed: bool) -> tuple[float, ...]:
    """The 256 values of the dynamic data type in rising order (bitsandbytes' and torchao's ``create_dynamic_map``).

    Decade i has 2**i centres of equal parts of its range, or 2**(i + 1) where there are no negative ones.
    """
    levels = [0.0, 1.0]
    for decade in range(DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        unit = 10.0 ** (decade - DECADES + 1)
        centres = [unit * (0.1 + 0.9 * (k + 0.5) / parts) for k in range(parts)]
        levels += centres + [-centre for centre in centres if signed]
    return tuple(sorted(levels))


class Values(NamedTuple):
    """``table``: the value of every code; code 0 is 0.0, so that zeroed memory is zero. ``between``: the middles of
    neighbours in rising order; ``zero``: how many values are below 0.
    """

    table: Tensor
    between: Tensor
    zero: int


@lru_cache(maxsize=16)
def values_of(signed: bool, dtype: torch.dtype, device: torch.device) -> Values:
    """The values on a device."""
    with torch.inference_mode(False):
        rising = torch.tensor(dynamic_values(signed), dtype=torch.float64, device="cpu")
        zero = int((rising < 0).sum())
        between = (rising[1:] + rising[:-1]) / 2
        return Values(rising.roll(-zero).to(device, dtype), between.to(device, dtype), zero)


def blocks_of(width: int, phase: int) -> int:
    """In how many blocks the entries of a row lie, of which the first is number ``phase`` of its block."""
    return -(-(phase + width) // BLOCK) if width else 0


def quantize(values: Tensor, phase: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (rows x width, uint8) and scales (rows x blocks) of a 2-D tensor, see ``Packed``."""
    rows, width = values.shape
    blocks = blocks_of(width, phase)
    known = values_of(signed, values.dtype, values.device)
    if values.numel() == 0:
        return values.new_empty(rows, width, dtype=CODE), values.new_empty(rows, blocks)
    padded = torch.nn.functional.pad(values, (phase, blocks * BLOCK - phase - width)).view(rows, blocks, BLOCK)
    most, least = padded.amax(2), padded.amin(2)
    scales = torch.where(most >= -least, most, least) if signed else most
    scales = torch.where(most.isnan(), most, scales)
    divisors = torch.where(scales == 0, torch.ones_like(scales), scales)
    parts = (padded / divisors.unsqueeze(2)).view(rows, -1)[:, phase : phase + width]
    places = torch.bucketize(parts.contiguous(), known.between, out_int32=True)
    if signed:
        places = (places - known.zero).remainder_(256)
    else:
        places.clamp_(min=(parts > 0).to(places.dtype))
    return places.to(CODE), scales


def dequantize(codes: Tensor, scales: Tensor, phase: int, signed: bool) -> Tensor:
    """The values, in the scales' dtype."""
    rows, width = codes.shape
    table = values_of(signed, scales.dtype, scales.device).table
    decoded = table.index_select(0, codes.reshape(-1).int()).view(rows, width)
    if codes.numel() == 0:
        return decoded
    if phase == 0 and width % BLOCK == 0:
        decoded.view(rows, -1, BLOCK).mul_(scales.unsqueeze(2))
    else:
        block = torch.arange(phase, phase + width, device=codes.device).floor_divide_(BLOCK)
        decoded.mul_(scales.index_select(1, block))
    return decoded


class Packed(NamedTuple):
    """Some rows of a moment, quantized in place: codes and scales are views of what is kept.

    ``phase``: which entry of its block the first one of every row is; blocks are those of the whole R.
    """

    codes: Tensor
    scales: Tensor
    phase: int
    signed: bool

    def wide(self) -> Tensor:
        """A copy as numbers, rows x width."""
        return dequantize(self.codes, self.scales, self.phase, self.signed)

    def keep_(self, values: Tensor) -> None:
        """Take over numbers of as many rows."""
        codes, scales = quantize(values, self.phase, self.signed)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def rows(self, start: int, stop: int) -> Packed:
        """Some of the rows."""
        return self._replace(codes=self.codes[start:stop], scales=self.scales[start:stop])

    def area(self, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """A rectangle as numbers."""
        first, last = (self.phase + cols[0]) // BLOCK, blocks_of(cols[1], self.phase)
        codes, scales = self.codes[slice(*rows), slice(*cols)], self.scales[slice(*rows), first:last]
        return dequantize(codes, scales, (self.phase + cols[0]) % BLOCK, self.signed)

    def numel(self) -> int:
        """How many entries there are."""
        return self.codes.numel()
