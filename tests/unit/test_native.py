"""The C++ kernel of CPU tensors against torch's operations, and how it is built."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from building import drawn, tile_selections
from torch import Tensor

from frugal_dist import Frugal
from frugal_dist.config import FrugalConfig
from frugal_dist.projection.coordinates import Columns, Flat
from frugal_dist.update import kernels
from frugal_dist.update.kernels import native
from frugal_dist.update.kernels.jobs import Noise, TileUpdate
from frugal_dist.update.local import step_tiles
from frugal_dist.update.stochastic_rounding import round_stochastically_

ROOT = Path(__file__).parents[2]
CONFIG = FrugalConfig(lr=1e-2, state_free_lr_scale=0.3, projection="columns")
# Multiples of nothing, of 16, less than a line and many of them; wide rows; more than a thread takes at a time.
SHAPES = [(37, 61), (16, 144), (1, 5), (7, 1), (3, 4100), (513, 70)]


def steps(weight_dtype: torch.dtype, grad_dtype: torch.dtype, decay: float, number: int = 3) -> list[Tensor]:
    """Weights and moments after some steps with gradients that are zero here and there."""
    torch.manual_seed(0)
    results = []
    for rows, cols in SHAPES:
        for selection in tile_selections(rows, cols):
            weight = torch.randn(rows, cols).to(weight_dtype)
            own = () if selection is None else [torch.zeros(selection.shape(rows, cols)) for _ in "mv"]
            for step in range(1, number + 1):
                grad = (torch.randn(rows, cols) * (torch.rand(rows, cols) > 0.1)).to(grad_dtype)
                step_tiles([TileUpdate(weight, grad, selection, own, step, decay, CONFIG)])
            results += [weight, *own]
    return results


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(action: Any) -> tuple[Any, Any]:
        results = []
        for choice in ("native", "torch"):
            monkeypatch.setenv(kernels.VARIABLE, choice)
            results.append(action())
        return results[0], results[1]

    return run


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_fp32_weights_step_as_in_torch(grad_dtype: torch.dtype, decay: float, both: Any) -> None:
    for mine, theirs in zip(*both(lambda: steps(torch.float32, grad_dtype, decay)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_bf16_weights_are_rounded_once_to_the_nearest(grad_dtype: torch.dtype, both: Any) -> None:
    """Where both round the same number they agree; a last bit of fp32 decides a tie now and then."""
    mine, theirs = (torch.cat([t.flatten().float() for t in both]) for both in both(
        lambda: [t for t in steps(torch.bfloat16, grad_dtype, 0.0, number=1) if t.dtype == torch.bfloat16]
    ))  # fmt: skip
    assert (mine != theirs).float().mean() < 1e-3
    torch.testing.assert_close(mine, theirs, rtol=8e-3, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_number_of_threads_gives_the_same_bits(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "native")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = steps(torch.float32, torch.float32, 0.1)
        torch.set_num_threads(threads)
        got = steps(torch.float32, torch.float32, 0.1)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_a_tile_of_a_matrix_gets_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors and what remains of a line are computed alike, so layouts cannot differ."""
    monkeypatch.setenv(kernels.VARIABLE, "native")
    torch.manual_seed(0)
    rows, cols = 29, 83
    weight, grad, index = torch.randn(rows, cols), torch.randn(rows, cols), drawn(cols, 0.4)
    whole, moments = weight.clone(), [torch.zeros(rows, index.numel()) for _ in "mv"]
    step_tiles([TileUpdate(whole, grad, Columns(index), moments, 1, 0.1, CONFIG)])
    for start, stop in ((0, 17), (17, 50), (50, 83)):
        selection = Columns(index).local(type("R", (), {"rows": (0, rows), "cols": (start, stop)}))  # type: ignore[arg-type]
        part, own = weight[:, start:stop].clone(), [torch.zeros(rows, selection.index.numel()) for _ in "mv"]
        step_tiles([TileUpdate(part, grad[:, start:stop].clone(), selection, own, 1, 0.1, CONFIG)])
        assert torch.equal(part, whole[:, start:stop])


@pytest.mark.parametrize("options", [{"density": 0.0}, {"projection": "columns"}, {"projection": "rows"},
                                     {"projection": "randk"}], ids=str)  # fmt: skip
def test_stochastic_rounding_draws_the_same_bits(options: dict[str, Any], both: Any) -> None:
    def run() -> Tensor:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(48, 80).bfloat16())
        groups = [{"params": [("w", weight)], "projected": True}]
        optimizer = Frugal(
            groups, lr=1e-3, rounding="stochastic", weight_decay=0.1, update_gap=2, process_group=None, **options
        )
        for _ in range(5):
            weight.grad = torch.randn(48, 80).bfloat16()
            optimizer.step()
        return weight.detach()

    mine, theirs = both(run)
    if options == {"density": 0.0}:
        assert torch.equal(mine, theirs)
    assert (mine != theirs).float().mean() < 2e-3  # a last bit of fp32 decides now and then


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 100_003), (513, 70), (7, 1), (3, 40_000)], ids=str)
def test_a_copy_is_rounded_with_the_same_bits(shape: tuple[int, int], threads: int, both: Any) -> None:
    """Of any parameter, as after a step of 8-bit moments or of a basis; the index goes beyond 32 bits."""
    torch.manual_seed(0)
    wide = torch.randn(shape) * torch.logspace(-30, 30, shape[1])
    wide[0, :: shape[1] // 3 + 1] = torch.tensor(float("nan"))
    wide[-1, -1] = -float("inf")
    starts = torch.arange(shape[0]) * 7 * shape[1] + (1 << 32) - 1000
    before = torch.get_num_threads()

    def run() -> Tensor:
        target = torch.zeros(shape, dtype=torch.bfloat16)
        round_stochastically_(target, wide, starts, seed=3, name="w", step=5)
        return target.nan_to_num(nan=123.0, neginf=-torch.inf).view(torch.int16)  # one NaN is as good as another

    try:
        torch.set_num_threads(threads)
        mine, theirs = both(run)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(mine, theirs)


def test_copies_that_are_not_contiguous_are_rounded_by_torch(both: Any) -> None:
    def run() -> Tensor:
        target = torch.zeros(6, 8, dtype=torch.bfloat16)
        round_stochastically_(target[:, 1:5], torch.ones(6, 4) / 3, torch.arange(6) * 8 + 1, seed=3, name="w", step=5)
        return target.view(torch.int16)

    mine, theirs = both(run)
    assert torch.equal(mine, theirs)
    assert bool((mine[:, 1:5] != 0).all())
    assert not mine[:, [0, 5, 6, 7]].any()


def test_single_entries_of_a_part_of_the_columns_are_left_to_torch_if_they_are_rounded_stochastically() -> None:
    weight, moments = torch.zeros(4, 8, dtype=torch.bfloat16), (torch.zeros(2), torch.zeros(2))
    selection = Flat(torch.tensor([1, 9], dtype=torch.int32), 8)
    for stride, taken in ((8, True), (16, False)):
        job = TileUpdate(weight, weight, selection, moments, 1, 0.0, CONFIG, Noise((1, 2), 0, stride))
        assert (native.kind_of(job) is not None) is taken


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({"state_full": "lion"}, torch.randn(16, 48)),
        ({"state_free": "none"}, torch.randn(16, 48)),
        ({}, torch.randn(16, 48, dtype=torch.float64)),
        ({}, torch.randn(16, 48, dtype=torch.float16)),
        ({}, torch.randn(48, 16).T),
    ],
)
def test_what_it_is_not_made_for_is_left_to_torch(options: dict[str, Any], weight: Tensor) -> None:
    moments = (torch.zeros(16, 2), torch.zeros(16, 2))
    job = TileUpdate(weight, weight, Columns(torch.tensor([1, 5])), moments, 1, 0.0, replace(CONFIG, **options))
    assert native.kind_of(job) is None
    assert not native.Launches().take(job)


def test_several_signed_steps_in_one_call_are_those_of_one_each() -> None:
    torch.manual_seed(0)
    grads = [torch.randn(height, 24) for height in (8, 16, 1)]
    weights, others = ([torch.full_like(grad, 0.5) for grad in grads] for _ in range(2))
    assert native.sign_steps_(weights, grads, CONFIG, 0.1)
    size = CONFIG.lr * CONFIG.projected_lr_scale * CONFIG.state_free_lr_scale
    for weight, other, grad in zip(weights, others, grads, strict=True):
        assert native.sign_step_(other, grad, size, 1.0 - CONFIG.lr * 0.1)
        assert torch.equal(weight, other)
    assert not native.sign_steps_([weights[0], weights[1].T], [grads[0], grads[1].T], CONFIG, 0.1)
    assert all(map(torch.equal, weights, others)), "nothing is done if one of them is left to torch"


def test_a_backward_that_needs_the_old_weights_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "native")
    layers = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
    optimizer = Frugal([{"params": [(f"w{i}", w) for i, w in enumerate(layers)], "projected": True}], density=0)
    out = torch.ones(1, 8) @ layers[0] @ layers[1]
    out.sum().backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.square().sum().backward()


# --- building -------------------------------------------------------------------------------------------------------

STEP = """
import sys, torch
from frugal_dist import Frugal
w = torch.nn.Parameter(torch.ones(8, 8)); w.grad = torch.ones(8, 8)
optimizer = Frugal([{"params": [("w", w)], "projected": True}], density=0, lr=0.5)
optimizer.step()
print(float(w.detach().sum()))
"""


def step_in_a_process(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), **variables}
    return subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.heavy
def test_it_is_built_once_and_a_killed_build_hinders_nobody(tmp_path: Path) -> None:
    (tmp_path / ".frugal_dist_native_killed.so").write_bytes(b"half of it")
    (tmp_path / "lock").touch()
    first = step_in_a_process(tmp_path)
    built = sorted(tmp_path.glob("frugal_dist_native_*.so"))
    assert (first.returncode, first.stdout.strip(), len(built)) == (0, "32.0", 1), first.stderr
    again = step_in_a_process(tmp_path, PATH="/nowhere")
    assert (again.stdout.strip(), again.stderr) == ("32.0", ""), "no compiler is needed any more"


def test_without_a_compiler_torch_steps_and_it_is_said_once(tmp_path: Path) -> None:
    done = step_in_a_process(tmp_path, CXX="no-such-compiler")
    assert done.stdout.strip() == "32.0"
    assert done.stderr.count("there is no C++ compiler 'no-such-compiler'; install g++ or set CXX") == 1
    asked = step_in_a_process(tmp_path, CXX="no-such-compiler", FRUGAL_KERNELS="native")
    assert "FRUGAL_KERNELS=native, but the C++ kernel cannot be built here" in asked.stderr


def test_a_user_without_a_home_can_import_and_step(tmp_path: Path) -> None:
    """As in a container with a user number that nobody has a name for."""
    nameless = "import os, pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"
    hidden = ("HOME", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", nameless + STEP],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "32.0", done.stderr
    assert done.stderr.count("The C++ kernel for CPU tensors cannot be built") == 1
    assert not list(tmp_path.iterdir()), "nothing is put where the program happens to run"


def test_the_bits_of_an_index() -> None:
    for length in (1, 64, 1000):
        index = drawn(length, 0.4)
        flags = native.bits_of(index, length)
        told = [(int(flags[i // 8]) >> (i % 8)) & 1 for i in range(flags.numel() * 8)]
        assert [i for i, bit in enumerate(told) if bit] == index.tolist()
        assert flags.numel() % 8 == 0
