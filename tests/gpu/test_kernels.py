"""Compiled kernels against torch's operations on the same device: kinds, dtypes, sizes, alignment, strides, size."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy
import pytest
import torch
from torch import Tensor

from frugal_dist.config import FrugalConfig
from frugal_dist.projection.basis import silence_noise_
from frugal_dist.projection.coordinates import Columns, Flat, Rows, Selection
from frugal_dist.update.eightbit import Packed, quantize
from frugal_dist.update.kernels import fused_for
from frugal_dist.update.kernels.jobs import TileUpdate
from frugal_dist.update.local import state_free_, step_tiles

pytestmark = pytest.mark.timeout(600)
CONFIG = FrugalConfig(lr=1e-2, projection="columns", state_free_lr_scale=0.3)
SHAPES = [(16, 144), (37, 61), (1, 1), (1, 3000), (2000, 1), (64, 512)]


def shapes_on(device: torch.device) -> list[tuple[int, int]]:
    """Triton's interpreter is slow: it rehearses small ones."""
    return SHAPES if device.type == "cuda" else SHAPES[:3]


def some(count: int, every: int = 3) -> Tensor:
    return torch.arange(0, count, every, dtype=torch.int32)


KINDS: dict[str, Callable[[int, int], Selection | None]] = {
    "density 0": lambda rows, cols: None,
    "columns": lambda rows, cols: Columns(some(cols).long()),
    "rows": lambda rows, cols: Rows(some(rows).long(), cols),
    "randk": lambda rows, cols: Flat(some(rows * cols, 4), cols),
}
ROUNDING = {torch.float32: (2e-6, 1e-7), torch.bfloat16: (8e-3, 1e-5), torch.float16: (2e-3, 1e-5)}
DTYPES = [
    *((dtype, dtype) for dtype in ROUNDING),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
]
"""Of weights, and of gradients."""


def stepped(
    device: torch.device, kind: str, dtypes: tuple[torch.dtype, torch.dtype], offset: int, wide: bool
) -> list[Tensor]:
    """Weights and moments after two steps. The weights of all shapes are slices of one buffer, which begin ``offset``
    entries in. ``wide``: computed in fp32 from the same numbers.
    """
    dtype, of_grads = dtypes
    generator = torch.Generator().manual_seed(0)
    shapes = shapes_on(device)
    total, kept = offset + sum(map(prod, shapes)), torch.float32 if wide else dtype
    buffer = torch.randn(total, generator=generator).to(device, dtype).to(kept)
    selections = [KINDS[kind](*shape) for shape in shapes]
    moments = [
        () if one is None else tuple(torch.zeros(one.shape(*shape), device=device) for _ in "mv")
        for one, shape in zip(selections, shapes, strict=True)
    ]
    selections = [None if one is None else one.to(device) for one in selections]
    for step in (1, 2):
        grads = (torch.randn(total, generator=generator) * torch.rand(total, generator=generator).gt(0.1)).to(device)
        jobs, start = [], offset
        for shape, selection, own in zip(shapes, selections, moments, strict=True):
            part = slice(start, start + prod(shape))
            grad = grads.to(of_grads).to(kept if wide else of_grads)[part].view(shape)
            jobs.append(TileUpdate(buffer[part].view(shape), grad, selection, own, step, 0.1, CONFIG))
            start += prod(shape)
        step_tiles(jobs)
        if wide:
            buffer.copy_(buffer.to(dtype))
    return [buffer.float(), *(moment for own in moments for moment in own)]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_does_what_torch_does(
    device: torch.device,
    kernels: None,
    kind: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    offset: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rehearse_once(device, dtypes, offset)
    fused = stepped(device, kind, dtypes, offset, wide=False)
    monkeypatch.setenv("FRUGAL_KERNELS", "torch")
    rtol, atol = ROUNDING[dtypes[0]]
    for one, other in zip(fused, stepped(device, kind, dtypes, offset, wide=True), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def rehearse_once(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], offset: int) -> None:
    """tests/unit/test_kernels.py has the kernels in Triton's interpreter; here it is the test that is tried."""
    if device.type == "cpu" and (offset or set(dtypes) != {torch.float32}):
        pytest.skip("Triton's interpreter is slow, and cuts numbers off where a GPU, and torch, round them")


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_signed_step_of_one_matrix(
    device: torch.device, kernels: None, dtypes: tuple[torch.dtype, torch.dtype], offset: int
) -> None:
    """The kernel that needs no table."""
    dtype, of_grads = dtypes
    rehearse_once(device, dtypes, offset)
    for rows, cols in shapes_on(device):
        weight, grad = (torch.randn(offset + rows * cols, device=device) for _ in "wg")
        grad *= torch.rand_like(grad).gt(0.1)
        weight, grad = (one.to(to)[offset:].view(rows, cols) for one, to in ((weight, dtype), (grad, of_grads)))
        fused = fused_for(weight)
        assert fused is not None
        want = torch.add(weight.float() * 0.75, grad.float().sign(), alpha=-0.01)
        assert fused.sign_step_(weight, grad, 0.01, 0.75)
        rtol, atol = ROUNDING[dtype]
        torch.testing.assert_close(weight.float(), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("offset", [0, 1])
def test_the_signed_step_without_rows_of_noise(device: torch.device, kernels: None, offset: int) -> None:
    """Every other row has hardly any residual, and one has none at all."""
    rehearse_once(device, DTYPES[0], offset)
    if device.type == "cpu":
        pytest.importorskip("triton", minversion="3.7", reason="3.6's interpreter runs no loop up to an argument")
    for rows, cols in shapes_on(device):
        weight, rest, grad = (torch.randn(offset + rows * cols, device=device)[offset:].view(rows, cols) for _ in "wrg")
        for one in (rest, grad):
            one += one.sign()  # none is near 0
        rest[::2] *= 1e-3
        rest[-1:] *= rows == 1
        fused = fused_for(weight)
        assert fused is not None
        kept = silence_noise_(rest.clone(), grad, "right", 0.05)
        assert not kept[::2].any() and not kept[-1].any() and (rows < 3 or kept[1].any())
        want = torch.add(weight * 0.75, kept.sign(), alpha=-0.01)
        assert fused.sign_step_above_(weight, rest, grad, 0.01, 0.75, 0.05)
        torch.testing.assert_close(weight, want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("of_grads", ROUNDING, ids=str)
def test_8_bit_moments_in_one_pass(device: torch.device, kernels: None, of_grads: torch.dtype, offset: int) -> None:
    """Codes and scales are those of what the numbers become; where a last bit decides, a code is its neighbour."""
    rehearse_once(device, (torch.float32, of_grads), offset)
    rates = (0.9, 0.999)
    for rows, cols, phase in ((16, 144, 0), (37, 61, 250), (1, 1, 3), (1, 3000, 0), (64, 512, 16)):
        generator = torch.Generator().manual_seed(0)
        buffers = [torch.randn(offset + rows * cols, generator=generator) for _ in "wgmv"]
        buffers[1:] = [one * 10.0 ** (-5 * torch.rand(one.shape, generator=generator)) for one in buffers[1:]]
        weight, grad, first, second = (one.to(device)[offset:].view(rows, cols) for one in buffers)
        grad = torch.cat([grad.new_zeros(offset), grad.flatten()]).to(of_grads)[offset:].view(rows, cols)
        own = [
            Packed(*quantize(first, phase, True), phase, True),
            Packed(*quantize(second**2, phase, False), phase, False),
        ]
        wide, moments = grad.double(), [one.wide().double() for one in own]
        moments = [
            rate * one + (1 - rate) * new for rate, one, new in zip(rates, moments, (wide, wide**2), strict=True)
        ]
        move = moments[0] / (1 - 0.9**3) / (moments[1].sqrt() / (1 - 0.999**3) ** 0.5 + CONFIG.eps)
        want = (weight.double() * (1 - 0.1 * 0.5) - 0.1 * move).float()
        fused = fused_for(weight)
        assert fused is not None
        assert fused.step_codes_([weight], [grad], [own], 3, 0.1, 0.5, CONFIG)
        torch.testing.assert_close(weight, want, rtol=1e-5, atol=1e-5)
        for one, values in zip(own, moments, strict=True):
            codes, scales = quantize(values.float(), phase, one.signed)
            torch.testing.assert_close(one.scales, scales, rtol=1e-6, atol=0)
            apart = (one.codes.int() - codes.int()).abs()
            assert float((apart != 0).float().mean()) < 2e-3 and float(apart.remainder(255).max()) <= 1


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_that_of_a_search(device: torch.device, kernels: None, signed: bool) -> None:
    """Of moments that are the gradient, or its square: all sizes down to what is no number of any scale."""
    lines = torch.linspace(-1, 1, 64 * 256, device=device).view(64, 256) ** 7
    lines[:, 0], lines[0, 1:3], lines[1, 5], lines[2, 9] = 1.0, 1e-40, float("nan"), float("inf")
    own = [
        Packed(torch.zeros_like(lines, dtype=torch.uint8), torch.zeros(64, 1, device=device), 0, sign)
        for sign in (True, False)
    ]
    config = FrugalConfig(projection="columns", moments="8bit", betas=(0.0, 0.0))
    fused = fused_for(lines)
    assert fused is not None
    with numpy.errstate(all="ignore"):
        assert fused.step_codes_([torch.zeros_like(lines)], [lines], [own], 1, 0.0, 0.0, config)
    codes, scales = quantize(lines if signed else lines * lines, 0, signed)
    one = own[0 if signed else 1]
    assert torch.equal(one.codes, codes)
    torch.testing.assert_close(one.scales, scales, rtol=0, atol=0, equal_nan=True)


def test_more_matrices_than_a_table_has_room_for(device: torch.device, kernels: None) -> None:
    weights = torch.zeros(300, 5, device=device)
    step_tiles(TileUpdate(one, torch.ones_like(one), None, (), 1, 0.0, CONFIG) for one in weights.split(1))
    torch.testing.assert_close(weights, torch.full_like(weights, -0.3e-2))


def test_a_matrix_with_strides_is_left_to_torch(device: torch.device, kernels: None) -> None:
    weight = torch.zeros(33, 20, device=device).T
    state_free_(weight, torch.ones(20, 33, device=device), CONFIG)
    torch.testing.assert_close(weight, torch.full_like(weight, -0.3e-2))


def test_more_than_2_to_the_31_entries(gpu: torch.device) -> None:
    """Positions in the kernels are int32: such a matrix is torch's."""
    if torch.cuda.mem_get_info(gpu)[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    weight = torch.zeros(1 << 16, (1 << 15) + 1, dtype=torch.bfloat16, device=gpu)
    assert weight.numel() > 1 << 31
    state_free_(weight, torch.ones((), dtype=torch.bfloat16, device=gpu).expand(weight.shape), CONFIG)
    assert bool((weight[[0, 1000, -1]] == weight[0, 0]).all()) and float(weight[-1, -1]) < 0
    del weight
    half = torch.zeros((1 << 30) + 1, dtype=torch.bfloat16, device=gpu)  # a kernel's, though of more than 2^31 bytes
    state_free_(half.view(1, -1), torch.ones_like(half).view(1, -1), CONFIG)
    assert float(half[-1]) < 0 and float(half[0]) < 0
