"""8-bit moments: the values, the blocks and a step, against plain loops; what falls back, and what is refused."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frugal_dist import Frugal, FrugalConfig, checkpoint
from frugal_dist.projection.coordinates import Columns
from frugal_dist.update import rules
from frugal_dist.update.adamw import ADAMW
from frugal_dist.update.definition import Moment
from frugal_dist.update.eightbit import dequantize, dynamic_values, quantize
from frugal_dist.update.kernels import native
from frugal_dist.update.kernels.jobs import TileUpdate

BLOCK = 256


def torchaos_values(signed: bool) -> list[float]:
    """The dynamic map of bitsandbytes and torchao, with their parts of a range and middles of them."""
    found = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float64)
        middles = (10.0 ** (i - 6) * (ends[:-1] + ends[1:]) / 2).tolist()
        found += middles + ([-middle for middle in middles] if signed else [])
    return sorted(found)


@pytest.mark.parametrize("signed", [True, False])
def test_the_values_are_those_of_bitsandbytes(signed: bool) -> None:
    found = dynamic_values(signed)
    assert len(set(found)) == 256
    assert found == pytest.approx(torchaos_values(signed), rel=1e-12)
    assert found[0] == (-0.99296875 if signed else 0.0)
    assert next(value for value in found if value > 0) == pytest.approx(5.5e-7 if signed else 3.25e-7)


def naive(values: Tensor, phase: int, signed: bool) -> Tensor:
    """What becomes of a matrix that is quantized, block by block."""
    known, kept = torch.tensor(torchaos_values(signed), dtype=values.dtype), torch.zeros_like(values)
    for row, line in enumerate(values):
        start = 0
        while start < len(line):
            stop = min(start + BLOCK - (phase + start) % BLOCK, len(line))
            block = line[start:stop]
            scale = block[block.abs().argmax()]
            if scale != 0:
                nearest = (known - (block / scale).unsqueeze(1)).abs().argmin(1)
                nearest[(nearest == 0) & (block > 0) & (not signed)] = 1
                kept[row, start:stop] = known[nearest] * scale
            start = stop
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("width", "phase"), [(1, 0), (256, 0), (300, 0), (300, 200), (7, 253)])
def test_quantized_as_by_plain_loops(width: int, phase: int, signed: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, width, generator=generator, dtype=torch.float64).to(dtype)
    values *= torch.rand(4, width, generator=generator).to(dtype) ** 8
    values[1] = 0
    values[2] *= -1e-8
    values = values if signed else values.square()
    codes, scales = quantize(values, phase, signed)
    found = dequantize(codes, scales, phase, signed)
    torch.testing.assert_close(found, naive(values, phase, signed), rtol=1e-6, atol=0)
    assert codes.dtype == torch.uint8 and scales.dtype == dtype
    assert scales.shape == (4, -(-(phase + width) // BLOCK))
    assert bool((codes[1] == 0).all() and (scales[1] == 0).all()), "zeros are zeroed memory"
    assert signed or bool((found[values > 0] > 0).all())
    again = quantize(found, phase, signed)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales), "what was quantized stays what it is"


@pytest.mark.parametrize(
    ("bad", "signed"), [(float("nan"), True), (float("nan"), False), (float("inf"), False), (-float("inf"), True)]
)
def test_what_is_not_finite_shows(bad: float, signed: bool) -> None:
    values = torch.ones(1, 600)
    values[0, 300] = bad
    found = dequantize(*quantize(values, 0, signed), 0, signed)
    assert bool(found[0, 256:512].isnan().any())
    assert torch.equal(found[0, :256], values[0, :256]) and torch.equal(found[0, 512:], values[0, 512:])


SHAPES: dict[str, tuple[int, ...]] = {"embedding": (16, 300), "kernel": (8, 3, 15, 15), "vector": (4500,), "norm": (9,)}


def built(seed: int = 0, **options: Any) -> tuple[Frugal, dict[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {**SHAPES, "matrix": (20, 300)}
    named = {n: nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for n, s in shapes.items()}
    options = {"moments": "8bit", "projection": "columns", "density": 0.9, "update_gap": 3, "lr": 0.01, **options}
    return Frugal(list(named.items()), project=["matrix"], process_group=None, **options), named


def train(optimizer: Frugal, named: dict[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for param in named.values():
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)
        optimizer.step()


def test_a_step_is_that_of_adamw_on_what_was_quantized() -> None:
    """Regular parameters of any shape; those of few entries keep full moments."""
    optimizer, named = built(weight_decay=0.1)
    want = {name: param.detach().clone() for name, param in named.items()}
    moments = {name: [torch.zeros_like(param), torch.zeros_like(param)] for name, param in want.items()}
    for step in range(1, 4):
        train(optimizer, named, step, step + 1)
        for name in SHAPES:
            grad, (first, second) = named[name].grad, moments[name]
            assert grad is not None
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            want[name] *= 1 - 0.01 * 0.1
            root = second.sqrt() / (1 - 0.999**step) ** 0.5 + 1e-8
            want[name] -= 0.01 / (1 - 0.9**step) * first / root
            if name != "norm":
                rows = (first.shape[0], -1) if first.dim() > 1 else (1, -1)
                first, second = (
                    naive(moment.reshape(rows), 0, signed).view(first.shape)
                    for moment, signed in ((first, True), (second, False))
                )
            moments[name] = [first, second]
    for name in SHAPES:
        torch.testing.assert_close(named[name].detach(), want[name], rtol=0, atol=1e-12)
    state = {name: optimizer.state[param] for name, param in named.items()}
    assert state["norm"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    for name, scales in {"embedding": 32, "kernel": 24, "vector": 18}.items():
        assert state[name]["exp_avg"].dtype == torch.uint8 and state[name]["exp_avg"].numel() == named[name].numel()
        assert state[name]["exp_avg_sq_scale"].numel() == scales


def sparse_gradients() -> list[Tensor]:
    """Rows that are touched once, as rare words' are, with entries of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** (-6 * torch.rand(1, 300, generator=generator, dtype=torch.float64))
    return [torch.randn(16, 300, generator=generator, dtype=torch.float64) * sizes * (step == 0) for step in range(40)]


def test_no_step_is_larger_than_adamws_may_be() -> None:
    """A second moment that became 0 under a first one that did not would give steps of first / eps."""
    param = nn.Parameter(torch.zeros(16, 300, dtype=torch.float64))
    optimizer = Frugal([("w", param), ("m", nn.Parameter(torch.zeros(8, 8)))], lr=1.0, process_group=None,
                       project=["m"], moments="8bit", eps=1e-30)  # fmt: skip
    for grad in sparse_gradients():
        before, param.grad = param.detach().clone(), grad
        optimizer.step()
        assert float((param.detach() - before).abs().max()) < 1.5  # of AdamW's: 1, at the first


@pytest.mark.parametrize(
    "options",
    [
        {"projection": "svd", "on_refresh": "project", "density": 0.5},
        {"projection": "dct", "on_refresh": "keep", "density": 0.5},
        {"projection": "randk", "on_refresh": "project"},
        {"projection": "blockwise", "density": 1.0},
        {"state_full": "lion", "on_refresh": "keep"},
        {"state_full": "sgdm"},
        {"state_full": "muon", "density": 1.0},
        {"state_full": "normalized_momentum", "density": 1.0},
        {"projection": "svd", "density": 0.5, "state_free": "scaled", "growth_limit": 1.01},
        {"projection": "gaussian", "density": 0.5, "combine": "scale"},
    ],
)
def test_every_rule_stays_near_full_moments_and_resumes_exactly(options: dict[str, Any]) -> None:
    runs = [built(**options), built(**options, moments="full")]
    for run in runs:
        train(*run, 0, 5)
    (packed, named), (full, wide) = runs
    held, others = packed.state_bytes().held, full.state_bytes().held
    assert held < (0.5 if options.get("projection", "columns") in ("svd", "gaussian") else 0.35) * others
    for name, param in named.items():
        difference = (param.detach() - wide[name].detach()).abs()
        assert float(difference.mean()) < 5e-4, name  # of steps of 0.01 each
    twin, again = built(1, **options)
    for name, param in again.items():
        param.data.copy_(named[name].data)
    twin.load_state_dict(copy.deepcopy(packed.state_dict()))
    for run in (runs[0], (twin, again)):
        train(*run, 5, 8)
    for name, param in again.items():
        assert torch.equal(param, named[name]), name


def test_the_program_in_bf16() -> None:
    """fp32 scales, whatever rounding and slices there are."""
    optimizer, named = built(rounding="stochastic", weight_decay=0.1)
    for param in named.values():
        param.data = param.data.bfloat16()
    train(optimizer, named, 0, 5)
    assert optimizer.state[named["embedding"]]["exp_avg_scale"].dtype == torch.float32
    assert all(bool(param.isfinite().all()) for param in named.values())


def test_slices_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (1 << 20, 700):
        monkeypatch.setattr("frugal_dist.update.moment_storage.SLICE", size)
        monkeypatch.setattr("frugal_dist.step.inputs.SLICE", size)
        optimizer, named = built()
        for param in named.values():
            param.data = param.data.bfloat16()
        train(optimizer, named, 0, 3)
        found.append([param.detach().clone() for param in named.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_copies_and_pickles_go_on_alike() -> None:
    optimizer, named = built()
    train(optimizer, named, 0, 2)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        state = {key: value.clone() for store in twin.state.values() for key, value in store.items()}
        assert any(value.dtype == torch.uint8 for value in state.values())


@pytest.mark.parametrize(("then", "now"), [("full", "8bit"), ("8bit", "full")])
def test_a_checkpoint_goes_from_one_form_to_the_other(then: str, now: str, tmp_path: Path) -> None:
    """What is saved are numbers: 8-bit moments are those that were quantized, full ones exactly what the codes say."""
    model = nn.Module()
    before, named = built(moments=then)
    train(before, named, 0, 4)
    checkpoint.save(tmp_path / "saved", model, before)
    after, again = built(1, moments=now)
    checkpoint.load(tmp_path / "saved", model, after)
    packed, full = (after, before) if now == "8bit" else (before, after)
    for name, param in (again if now == "8bit" else named).items():
        other = (named if now == "8bit" else again)[name]
        codes, numbers = packed.state[param], full.state[other]
        for moment, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            if name == "norm":
                assert torch.equal(codes[moment], numbers[moment])
                continue
            want = numbers[moment].reshape(codes[moment].shape[0] if codes[moment].dim() > 1 else 1, -1)
            scales = codes[moment + "_scale"].view(len(want), -1)
            held = dequantize(codes[moment].view(want.shape), scales, 0, signed)
            if now == "8bit":
                want = dequantize(*quantize(want, 0, signed), 0, signed)
            assert torch.equal(held, want), (name, moment)
    for run in ((before, named), (after, again)):
        train(*run, 4, 6)
    assert all(bool(param.isfinite().all()) for param in again.values())


def test_state_without_the_scales_is_refused_by_name() -> None:
    optimizer, named = built()
    train(optimizer, named, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for number, store in saved["state"].items():
        if "exp_avg_sq_scale" in store:
            del saved["state"][number]["exp_avg_sq_scale"]
    twin, _ = built(1)
    with pytest.raises(ValueError, match=r"the loaded exp_avg_sq_scale has nothing"):
        twin.load_state_dict(saved)


def test_what_cannot_be_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"moments='8bits' is not known. Use one of full, 8bit. Did you mean '8bit'"):
        FrugalConfig(moments="8bits")
    silent = replace(ADAMW, name="silent", moments=(Moment("exp_avg", signed=True), Moment("exp_avg_sq")))
    monkeypatch.setitem(rules.STATE_FULL, "silent", silent)
    FrugalConfig(state_full="silent")
    with pytest.raises(ValueError, match=r"moments='8bit': state_full='silent' does not say .* exp_avg_sq stand for"):
        FrugalConfig(state_full="silent", moments="8bit")


def test_kernels_of_whole_tiles_read_no_codes() -> None:
    weight, moments = torch.ones(4, 4), (torch.zeros(4, 2), torch.zeros(4, 2))
    selection = Columns(torch.tensor([0, 2]))
    job = TileUpdate(weight, weight.clone(), selection, moments, 1, 0.0, FrugalConfig(projection="columns"))
    kinds: list[Any] = [native.kind_of]
    launch = pytest.importorskip("frugal_dist.update.kernels.launch")
    kinds.append(launch.kind_of)
    for kind_of in kinds:
        assert kind_of(job) is not None
        assert kind_of(job._replace(config=FrugalConfig(projection="columns", moments="8bit"))) is None
