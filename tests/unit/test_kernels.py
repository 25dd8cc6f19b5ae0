"""The Triton kernels do what the pure functions do: run by Triton's interpreter, on CPU tensors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import numpy
import pytest
import torch
from building import tile_selections
from torch import Tensor

from frugal_dist import Frugal
from frugal_dist.config import FrugalConfig
from frugal_dist.projection.basis import Basis
from frugal_dist.projection.coordinates import Columns, Flat, Selection
from frugal_dist.update import kernels
from frugal_dist.update.eightbit import Packed, dequantize, quantize, values_of
from frugal_dist.update.kernels.jobs import Noise, TileUpdate
from frugal_dist.update.kernels.tables import MOST, Tables
from frugal_dist.update.local import state_free_, step_tiles
from frugal_dist.update.stochastic_rounding import keys_of, round_stochastically_, row_starts

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed here (it has wheels for Linux on x86-64)",
)
CONFIG = FrugalConfig(lr=1e-2, lr_scale=0.5, state_free_lr_scale=0.3, projection="columns")
SHAPES = [(16, 144), (37, 61)]  # the one is a multiple of 16 throughout; both are more than one block, not all full


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are interpreted if that is said before they are read, for the rest of the process."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    kernels._load.cache_clear()
    yield
    kernels._load.cache_clear()


@pytest.fixture
def starts(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What kernels were started with."""
    from frugal_dist.update.kernels import launch

    found: list[Any] = []
    start = launch._start
    monkeypatch.setattr(launch, "_start", lambda group: (found.append(group), start(group)))
    return found


def selections(rows: int, cols: int) -> list[Selection | None]:
    """Also one entry just where a block of the kernel begins."""
    return [*tile_selections(rows, cols), Flat(torch.tensor([1024], dtype=torch.int32), cols)]


def steps(dtype: torch.dtype, decay: float) -> list[Tensor]:
    """Weights and moments after some steps; some gradients are zero. Weights are views of one buffer, as in ZeRO.

    One step in bf16: the interpreter cuts numbers off where a GPU, and torch, round them.
    """
    torch.manual_seed(0)
    chosen = [(shape, selection) for shape in SHAPES for selection in selections(*shape)]
    buffer = torch.randn(sum(prod(shape) for shape, _ in chosen)).to(dtype)
    moments = [[torch.zeros(() if one is None else one.shape(*shape)) for _ in "mv"] for shape, one in chosen]
    for step in range(1, 2 if dtype == torch.bfloat16 else 3):
        jobs, start = [], 0
        for (shape, selection), own in zip(chosen, moments, strict=True):
            weight = buffer[start : start + prod(shape)].view(shape)
            grad = (torch.randn(shape) * (torch.rand(shape) > 0.1)).to(dtype)
            jobs.append(TileUpdate(weight, grad, selection, own if selection is not None else (), step, decay, CONFIG))
            start += prod(shape)
        step_tiles(jobs)
    return [buffer, *(moment for own in moments for moment in own)]


@needs_triton
@pytest.mark.parametrize(("dtype", "decay"), [(torch.float32, 0.0), (torch.float32, 0.5), (torch.bfloat16, 0.0)])
def test_many_matrices_at_once(
    dtype: torch.dtype, decay: float, starts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = steps(dtype, decay)
    once = starts[: len(starts) if dtype == torch.bfloat16 else len(starts) // 2]
    told = sorted((group.kind.kernel.__name__, group.aligned, len(group.jobs)) for group in once)
    kinds = [("flat", 2), ("lines", 1), ("lines", 1), ("sign", 2)]
    assert told == sorted((name, aligned, number) for name, number in kinds for aligned in (False, True))
    monkeypatch.setenv(kernels.VARIABLE, "torch")
    want = steps(dtype, decay)
    for one, other in zip(found, want, strict=True):
        rounding = {"rtol": 8e-3, "atol": 1e-5} if one.dtype == torch.bfloat16 else {"rtol": 2e-6, "atol": 1e-7}
        torch.testing.assert_close(one, other, **rounding)


@needs_triton
def test_a_start_takes_so_many_matrices_and_entries(starts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from frugal_dist.update.kernels import launch

    def step(number: int) -> None:
        step_tiles(TileUpdate(one, torch.ones(1, 3), None, (), 1, 0.0, CONFIG) for one in weights[:number].split(1))

    weights = torch.zeros(130, 3)
    step(130)
    monkeypatch.setattr(launch, "RUN", 6)
    step(5)
    assert [len(group.jobs) for group in starts] == [128, 2, 2, 2, 1]
    size = CONFIG.lr * CONFIG.projected_lr_scale * CONFIG.state_free_lr_scale
    torch.testing.assert_close(weights, torch.tensor([-2 * size] * 5 + [-size] * 125).view(-1, 1).expand(130, 3))


KEY = {"seed": 3, "name": "w", "step": 5}
FAR = (1 << 32) - 5000
"""Indices from here on cross the end of 32 bits."""


@needs_triton
@pytest.mark.parametrize("apart", [0, 3], ids=["all columns", "some columns"])
def test_kernels_round_stochastically_with_the_same_bits(apart: int, starts: list[Any]) -> None:
    """A bf16 step is an fp32 step of the same numbers, rounded as in torch; ``apart``: columns that lie elsewhere."""
    torch.manual_seed(0)
    for shape in SHAPES:
        rows, cols = shape
        for selection in (one for one in selections(*shape) if one is None or not one.complete):
            weight, grad = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
            weight[0, 0], weight[1, 1], grad[0, 0] = float("inf"), float("nan"), 1.0
            wide, want = weight.float(), torch.empty_like(weight)
            own = () if selection is None else [torch.zeros(selection.shape(*shape)) for _ in "mv"]
            noise = Noise(keys_of(**KEY), FAR, cols + apart)  # type: ignore[arg-type]
            others = [moment.clone() for moment in own]
            step_tiles([TileUpdate(weight, grad, selection, own, 1, 0.5, CONFIG, noise)])
            step_tiles([TileUpdate(wide, grad, selection, others, 1, 0.5, CONFIG)])
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(kernels.VARIABLE, "torch")
                round_stochastically_(want, wide, FAR + torch.arange(rows) * (cols + apart), **KEY)  # type: ignore[arg-type]
            assert torch.equal(weight.nan_to_num(7.0), want.nan_to_num(7.0)), selection
            assert all(torch.equal(one, other) for one, other in zip(own, others, strict=True))
            assert weight[0, 0] == float("inf") and weight[1, 1].isnan() and not want[1, 0].isnan()
    assert [group.kind.kernel.__name__ for group in starts[::2]] == [
        "lines",
        "lines",
        "flat",
        "sign",
        "sign",
        "flat",
    ] * 2


@needs_triton
def test_an_optimizer_rounds_stochastically_with_them(starts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a wide copy of any matrix, and with keys that differ from step to step."""
    results = []
    for choice in ("triton", "torch"):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(24, 40).bfloat16())
        groups = [{"params": [("w", weight)], "projected": True}]
        optimizer = Frugal(groups, projection="rows", rounding="stochastic", weight_decay=0.1, process_group=None)
        for _ in range(3):
            weight.grad = torch.randn(24, 40).bfloat16()
            optimizer.step()
        results.append(weight.detach().float())
    assert [job.noise for group in starts for job in group.jobs] == [
        Noise(keys_of(optimizer.param_groups[0]["seed"], "w", updates), 0, 40) for updates in range(3)
    ]
    assert (results[0] == results[1]).float().mean() > 0.995  # a last bit of fp32 decides now and then


@needs_triton
@pytest.mark.parametrize("shape", [(), (5,), (3000,), (37, 61), (3, 1100), (2, 3, 40)])
def test_one_kernel_rounds_stochastically_with_the_same_bits(
    shape: tuple[int, ...], interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    wide, found = torch.randn(shape), []
    where = row_starts(tuple((0, n) for n in shape), shape, wide.device) + FAR
    for choice in ("triton", "torch"):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        if choice == "triton":
            monkeypatch.setattr("frugal_dist.update.stochastic_rounding.random_bits", None)  # torch's, not asked here
        found.append(torch.empty(shape, dtype=torch.bfloat16))
        round_stochastically_(found[-1], wide, where, **KEY)  # type: ignore[arg-type]
        monkeypatch.undo()
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert torch.equal(*found)
    assert wide.numel() == 1 or not torch.equal(found[0], wide.bfloat16())


def test_a_table_is_sent_again_only_when_it_differs() -> None:
    tables, entry = Tables(most=2), (16, 32, 0, 0, 0, 0, 7, 1, 0, 5, 9, 2, 3)
    cpu = torch.device("cpu")
    first = tables.of([0], [entry], cpu)
    assert first.view(-1, MOST)[:, 0].tolist() == [0, *entry]
    assert tables.of([0], [entry], cpu) is first
    for other in (48, 64):
        assert tables.of([0], [(other, *entry[1:])], cpu).view(-1, MOST)[1, 0] == other
    assert tables.of([0], [entry], cpu) is not first, "only the last ones are kept"


@needs_triton
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_signed_step_alone_gives_the_same_bits(
    decay: float, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    grad = torch.randn(SHAPES[1]) * (torch.rand(SHAPES[1]) > 0.1)
    grad[0, 0] = float("nan")
    config = replace(CONFIG, lr=2.0**-7, lr_scale=1.0, state_free_lr_scale=1.0)  # all products are exact
    results = []
    for choice in ("triton", "torch"):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        results.append((torch.arange(grad.numel()) % 513 / 256 - 1).view(grad.shape))
        state_free_(results[-1], grad, config, decay)
    assert torch.equal(*results)
    assert not torch.isnan(results[0]).any(), "as torch's sign, which is 0 for NaN"


@needs_triton
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_of_noise_are_left_out(side: str, interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", minversion="3.7", reason="3.6's interpreter runs no loop up to an argument")
    torch.manual_seed(0)
    grad = torch.randn(5, 1500) @ torch.diag(torch.linspace(0.1, 2, 1500))
    basis = Basis(**{side: torch.eye(1500 if side == "right" else 5)[:, -2:].contiguous()})
    grad[1:3, :-2] *= 1e-3  # rows with hardly any residual
    results = []
    for choice in ("triton", "torch"):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        moments = [torch.zeros(5, 2) if side == "right" else torch.zeros(2, 1500) for _ in "mv"]
        results.append(torch.ones(5, 1500))
        config = replace(CONFIG, projection="svd", residual_threshold=0.05)
        step_tiles([TileUpdate(results[-1], grad, None, moments, 1, 0.5, config, None, basis, side)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    if side == "right":
        kept = (results[0] - (1 - CONFIG.lr * 0.5)).abs() < 1e-6
        assert kept[:, :-2].all(1).tolist() == [False, True, True, False, False]


@needs_triton
@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({"state_full": "lion"}, torch.randn(16, 48)),
        ({"state_free": "none"}, torch.randn(16, 48)),
        ({}, torch.randn(16, 48, dtype=torch.float64)),
        ({}, torch.randn(48, 16).T),
    ],
)
def test_what_they_are_not_made_for_is_left_to_torch(
    options: dict[str, Any], weight: Tensor, interpreter: None
) -> None:
    fused = kernels.fused_for(weight)
    assert fused is not None
    moments = (torch.zeros(16, 2), torch.zeros(16, 2))
    job = TileUpdate(weight, weight, Columns(torch.tensor([1, 5])), moments, 1, 0.0, replace(CONFIG, **options))
    assert fused.kind_of(job) is None
    assert not fused.Launches().take(job)


@needs_triton
@pytest.mark.parametrize(
    ("projection", "density", "dtype"),
    [
        ("columns", 0.0, torch.float32),
        ("rows", 0.25, torch.float32),
        ("randk", 0.25, torch.float16),
        ("svd", 0.25, torch.float32),
        ("blockwise", 0.5, torch.float32),
    ],
)
def test_an_optimizer_with_them(
    projection: str, density: float, dtype: torch.dtype, starts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight decay of low-precision weights, too: kernels need no wide copies for it."""
    results = []
    for choice in ("triton", "torch"):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(24, 40).to(dtype)) for _ in range(2)]
        groups = [{"params": [(f"w{i}", weight) for i, weight in enumerate(weights)], "projected": True}]
        optimizer = Frugal(
            groups, projection=projection, density=density, update_gap=2, weight_decay=0.1, process_group=None
        )
        for _ in range(4):
            for weight in weights:
                weight.grad = torch.randn(24, 40).to(dtype)
            optimizer.step()
        results.append(torch.stack([weight.detach() for weight in weights]))
    torch.testing.assert_close(*results, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)
    if dtype == torch.float16:
        assert (results[0] == results[1]).float().mean() > 0.9
    alone = {"blockwise": 1}  # an active block goes to torch; the residuals of small matrices share a start
    assert [len(group.jobs) for group in starts] == [alone.get(projection, 2)] * 4


@needs_triton
@pytest.mark.parametrize("options", [{"projection": "columns"}, {"density": 0.0}], ids=str)
def test_a_backward_that_needs_the_old_weights_fails(options: dict[str, Any], interpreter: None) -> None:
    """As with every optimizer of torch: it would use old activations with new weights."""
    layers = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
    optimizer = Frugal([{"params": [(f"w{i}", w) for i, w in enumerate(layers)], "projected": True}], **options)
    out = torch.ones(1, 8) @ layers[0] @ layers[1]
    out.sum().backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.square().sum().backward()


class Wrapped(Tensor):
    """A tensor without memory of its own, as torchao's float8 weights under FSDP2."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        raise AssertionError("nothing is computed here")


@needs_triton
def test_tensors_without_memory_are_left_to_torch(interpreter: None) -> None:
    from frugal_dist.update.kernels import launch

    plain = torch.ones(8, 8)
    assert launch.kind_of(TileUpdate(plain, plain, None, (), 1, 0.0, CONFIG)) is not None
    assert launch.kind_of(TileUpdate(Wrapped(plain), plain, None, (), 1, 0.0, CONFIG)) is None
    assert launch.kind_of(TileUpdate(plain, Wrapped(plain), None, (), 1, 0.0, CONFIG)) is None
    assert not launch.sign_step_(Wrapped(plain), plain, 0.1)


# --- 8-bit moments ---------------------------------------------------------------------------------------------------

CODED = replace(CONFIG, moments="8bit")


def packed(rows: int, width: int, phase: int, generator: torch.Generator) -> list[Packed]:
    """Both moments, of entries of very different sizes."""
    found = []
    for signed in (True, False):
        values = torch.randn(rows, width, generator=generator) * torch.rand(rows, width, generator=generator) ** 8
        found.append(Packed(*quantize(values if signed else values.square(), phase, signed), phase, signed))
    return found


def rounded(value: float) -> float:
    """As a kernel is told of it."""
    return float(torch.tensor(value, dtype=torch.float32))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "phase"),
    [
        (1, 1, 0),
        (3, 256, 0),
        (5, 300, 0),
        (4, 300, 200),
        (2, 7, 253),
        (9, 48, 240),
        (1, 4500, 16),
        (0, 30, 0),
        (7, 0, 3),
    ],
)
def test_a_pass_over_codes_gives_those_of_torch(
    rows: int, width: int, phase: int, dtype: torch.dtype, interpreter: None
) -> None:
    """Bit for bit; the weights up to the rounding of roots and quotients. Gradients need no wide copy."""
    from frugal_dist.update.kernels import launch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    sizes = 10.0 ** (-6 * torch.rand(rows, width, generator=generator))
    grad = (torch.randn(rows, width, generator=generator) * sizes).to(dtype)
    own = packed(rows, width, phase, generator)
    wide, (first, second) = grad.double(), (one.wide().double() for one in own)
    # What is joined by name is rounded once, and each of the others.
    first = (rounded(1 - 0.9) * (wide - first).float().double() + first).float()
    squares = (rounded(1 - 0.999) * wide).float().double() * wide
    second = (squares + (rounded(0.999) * second).float().double()).float()
    want = weight.double() * 0.95 - 0.1 / (1 - 0.9**3) * first / (second.double().sqrt() / (1 - 0.999**3) ** 0.5 + 1e-8)
    assert launch.step_codes_([weight], [grad], [own], 3, 0.1, 0.5, CODED)
    for one, values in zip(own, (first, second), strict=True):
        codes, scales = quantize(values, phase, one.signed)
        assert torch.equal(one.codes, codes) and torch.equal(one.scales, scales)
    torch.testing.assert_close(weight.double(), want, rtol=2e-6, atol=1e-6)


def near_middles(signed: bool) -> Tensor:
    """Where a code changes to the next, the numbers beside, and what is small, large or on no scale; each line begins
    with the scale.
    """
    middles = values_of(signed, torch.float32, torch.device("cpu")).between.double()
    middles = middles if signed else middles.sqrt()  # second moments here are squares
    lines = [middles.float()]
    for _ in range(3):
        lines += [torch.nextafter(lines[-1], torch.ones(()))]
        lines = [torch.nextafter(lines[0], -torch.ones(())), *lines]
    found = torch.cat([torch.ones(len(lines), 1), torch.stack(lines)], 1)
    special = torch.zeros(5, 256)
    special[0, ::7], special[1, :4] = -0.0, torch.tensor([1e-38, -1e-42, 1e-45, 3e-39])
    special[2, 5], special[3, 9], special[4, 200] = float("nan"), float("inf"), -float("inf")
    special[2:, 10:50] = 2.0
    return torch.cat([found, -found, 3e-7 * found, special])


@needs_triton
@pytest.mark.parametrize("signed", [True, False])
def test_every_middle_of_neighbours_is_decided_as_by_a_search(signed: bool, interpreter: None) -> None:
    """Of moments that are the gradient, or its square."""
    from frugal_dist.update.kernels import launch

    grad = near_middles(signed)
    zeros = torch.zeros_like(grad, dtype=torch.uint8), torch.zeros(len(grad), 1)
    own = [Packed(*(one.clone() for one in zeros), 0, sign) for sign in (True, False)]
    config = replace(CODED, betas=(0.0, 0.0))
    with numpy.errstate(all="ignore"):  # of the interpreter, which would warn of what is not finite
        assert launch.step_codes_([torch.zeros_like(grad)], [grad], [own], 1, 0.0, 0.0, config)
    one = own[0 if signed else 1]
    codes, scales = quantize(grad if signed else grad * grad, 0, signed)
    assert len(codes.unique()) == 256
    assert torch.equal(one.codes, codes)
    torch.testing.assert_close(one.scales, scales, rtol=0, atol=0, equal_nan=True)
    shown = dequantize(one.codes, one.scales, 0, signed).isnan().any(1)
    assert shown[-3:].all() and not shown[:-3].any(), "a block that is not finite, and no other"


@needs_triton
def test_codes_that_a_kernel_is_not_made_for_are_left_to_torch(interpreter: None) -> None:
    """All tensors of a call, before anything is done."""
    from frugal_dist.update.kernels import launch

    weight, grad, own = torch.ones(4, 8), torch.ones(4, 8), packed(4, 8, 0, torch.Generator().manual_seed(0))
    wide = [one._replace(scales=one.scales.double()) for one in own]
    for params, grads, moments in (
        ([weight, weight.double()], [grad, grad.double()], [own, wide]),
        ([weight, weight], [grad, grad], [own, wide]),
        ([weight, torch.ones(8, 4).T], [grad, grad], [own, own]),
        ([weight, weight], [grad, torch.ones(8, 4).T], [own, own]),
        ([weight, weight], [grad, grad], [own, [one._replace(codes=one.codes[:, ::2]) for one in own]]),
    ):
        assert not launch.step_codes_(params, grads, moments, 1, 0.1, 0.0, CODED)
        assert torch.equal(weight, torch.ones(4, 8))
    assert launch.step_codes_([weight], [grad], [own], 1, 0.1, 0.0, CODED)
    assert not torch.equal(weight, torch.ones(4, 8))


@needs_triton
@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"projection": "columns"}, 3),
        ({"projection": "rows", "rounding": "stochastic"}, 3),
        ({"projection": "randk"}, 3),
        ({"projection": "svd", "density": 0.5}, 3),
        ({"projection": "blockwise", "density": 1.0}, 3),
        ({"projection": "columns", "density": 0.0}, 1),
        ({"projection": "columns", "state_full": "lion"}, 0),
    ],
    ids=str,
)
def test_an_optimizer_with_8_bit_moments(
    options: dict[str, Any], passes: int, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two matrices, and an embedding; where a last bit of fp32 decides, a code is its neighbour."""
    from frugal_dist.update.kernels import fused

    started: list[Any] = []
    get = type(fused.coded).__getitem__
    monkeypatch.setattr(
        type(fused.coded), "__getitem__", lambda self, grid: (started.append(self is fused.coded), get(self, grid))[1]
    )
    dtype, results, kept = torch.bfloat16 if "rounding" in options else torch.float32, [], []
    for choice in ("triton", "torch"):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        generator = torch.Generator().manual_seed(0)
        shapes = {"a": (24, 40), "b": (40, 24), "embedding": (9, 520)}
        named = {name: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in shapes.items()}
        optimizer = Frugal(
            list(named.items()), project=["a", "b"], moments="8bit", weight_decay=0.1, update_gap=2,
            process_group=None, **{"density": 0.25, **options},
        )  # fmt: skip
        for _ in range(3):
            for weight in named.values():
                weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
            optimizer.step()
        results.append(torch.cat([weight.detach().float().view(-1) for weight in named.values()]))
        kept.append(
            torch.cat([value.view(-1).int() for store in optimizer.state.values() for value in store.values()
                       if value.dtype == torch.uint8])
        )  # fmt: skip
    assert sum(started) == 3 * passes
    near = (results[0] - results[1]).abs() <= 1e-5
    assert near.float().mean() > 0.995 and (results[0] - results[1]).abs().max() < 0.02
    assert (kept[0] != kept[1]).float().mean() < 2e-3


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(2, 2)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for choice, kind in (("auto", "native"), ("native", "native"), ("torch", "torch")):
        monkeypatch.setenv(kernels.VARIABLE, choice)
        assert kernels.kind_for(weight) == kind
    monkeypatch.setenv(kernels.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="FRUGAL_KERNELS='cuda' is not known"):
        kernels.fused_for(weight)


def test_without_triton_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import that fails, as on a machine without the package."""
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    monkeypatch.setitem(__import__("sys").modules, "frugal_dist.update.kernels.launch", None)
    kernels._load.cache_clear()
    wanted = pytest.raises(ValueError, match="FRUGAL_KERNELS=triton, but triton cannot be imported")
    with pytest.warns(UserWarning, match="triton cannot be imported"), wanted:
        kernels.fused_for(torch.zeros(2, 2))
    kernels._load.cache_clear()
