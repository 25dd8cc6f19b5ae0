"""Everything a step does, with all tensors on a pretended GPU and collectives as strict as NCCL's.

The same weights come out, nothing mixes devices, no CPU tensor travels, and a step between refreshes never makes the
host wait for the device. A wait costs little on an idle machine and everything in training, where the host runs ahead.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import GAP, LAYOUTS, Case, Named, gradients, reference, weights
from pretend_gpu import gpu, installed, on_cpu
from storages import Held
from threads import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from frugal_dist import Frugal
from frugal_dist.engines import hooks
from frugal_dist.projection.dictionary import column_energies
from frugal_dist.projection.svd import exact_svd
from frugal_dist.update.eightbit import CODE, Packed
from frugal_dist.update.moment_storage import FORMS

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build device_guard.cpp"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
]
NAMES = ("tall", "broad", "experts")


def case(projection: str, on_refresh: str, side: str = "std", **more: Any) -> Case:
    return Case(projection, side, on_refresh, free="sign", names=NAMES, more=tuple(more.items()))


def free(rule: str, projection: str, on_refresh: str, **more: Any) -> Case:
    """With another rule of the rest, also in the group of the regular parameters."""
    return replace(case(projection, on_refresh, state_free=rule, **more), free=rule)


CASES = [
    *(case("svd", "reset"), case("columns", "keep"), case("randk", "project"), case("blockwise", "reset")),
    *(case("dct", "keep"), free("sinkhorn", "dct", "reset"), free("scaled", "svd", "keep", growth_limit=1.01)),
]
MORE = [
    case("svd", "project", side="full"),
    case("svd", "project", svd_method="subspace"),
    case("svd", "keep", svd_method="gram64"),
    case("svd", "reset", residual_threshold=0.8, basis_dtype="bf16"),
    case("svd", "reset", state_full="lion"),
    case("random", "keep"),
    case("rows", "project"),
    case("randperm", "keep"),
    case("columns", "reset", state_full="sgdm"),
    case("dct", "project", side="full"),
    case("random", "keep", combine="scale", growth_limit=1.01),
    free("softsign", "dct", "keep"),
    free("normalized", "svd", "reset"),
    replace(free("racs", "columns", "keep", density=0.0, growth_limit=1.01), densities=(0.0,)),
    replace(case("columns", "keep", density=1.0, state_full="muon"), densities=(1.0,)),
]


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FRUGAL_KERNELS", "torch")
    with installed():
        yield


def train(layout: str, case: Case, dtype: torch.dtype = torch.float64) -> tuple[Named, list[list[str]]]:
    """The weights after all steps, and what each step waited for."""
    waits = []
    start = {name: weights(dtype)[name] for name in reference(case, dtype)}
    with gpu() as device:
        held = LAYOUTS[layout]({name: one.to("cuda") for name, one in start.items()}, case.groups(), case.options)
        for grads in gradients(dtype):
            moved = {name: grads[name].to("cuda") for name in start}
            device.syncs.clear()
            held.step(moved)
            waits.append(list(device.syncs))
        return {name: on_cpu(one) for name, one in held.full().items()}, waits


def check(case: Case, found: Named, waits: list[list[str]], dtype: torch.dtype = torch.float64) -> None:
    want = reference(case, dtype)
    least = 1e-10 if dtype == torch.float64 else 1e-6
    assert not {n: one for n, one in found.items() if not (one - want[n]).abs().max() <= max(case.tolerance, least)}
    ordinary = [one for step, one in enumerate(waits) if step % GAP]
    assert ordinary and not any(ordinary), f"{case}: a step between refreshes waits for the device: {waits}"


@pytest.mark.parametrize("chosen", [*CASES, *MORE], ids=lambda one: f"{one.projection}-{one.on_refresh}")
def test_on_one_rank(chosen: Case) -> None:
    alone = replace(chosen, more=(*chosen.more, ("process_group", None)))
    check(chosen, *train("replicas", alone))


def test_split_products_do_not_wait() -> None:
    """In fp32, where they differ from others."""
    chosen = case("svd", "reset", matmul="bf16x3", process_group=None)
    check(replace(chosen, free="sgd"), *train("replicas", replace(chosen, free="sgd"), torch.float32), torch.float32)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["replicas, shared state", "Shard(0)", "ZeRO-1/2, 3 sub-groups", "ZeRO-3"])
def test_on_two_ranks(layout: str) -> None:
    for case in CASES:
        for found, waits in run_ranks(2, lambda rank, case=case: train(layout, case)):
            check(case, found, waits)


def test_eight_bit_moments_are_numbers_in_larger_slices_than_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice is about 14 launches."""
    monkeypatch.setattr("frugal_dist.update.moment_storage.SLICE", 256)
    monkeypatch.setattr("frugal_dist.update.moment_storage.CUDA_SLICE", 1024)
    found = {}
    with gpu():
        for device in ("cpu", "cuda"):
            param, codes = torch.zeros(8, 256, device=device), torch.zeros(8, 256, dtype=CODE, device=device)
            packed = Packed(codes, torch.ones(8, 1, device=device), 0, True)
            found[device] = len(list(FORMS["8bit"].turns([param], [param], [[packed]], elementwise=True)))
    assert found == {"cpu": 8, "cuda": 2}


def test_columns_of_the_dct_are_weighed_in_larger_pieces_than_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frugal_dist.projection.dictionary._PIECE", 16)
    monkeypatch.setattr("frugal_dist.projection.dictionary._CUDA_PIECE", 64)
    pieces: list[int] = []
    transform = torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda part: pieces.append(len(part)) or transform(part))
    with gpu():
        grad = torch.randn(10, 8)
        here, there = (column_energies(grad.to(device), "right")["right"] for device in ("cpu", "cuda"))
        assert pieces == [2] * 5 + [8, 2]
        torch.testing.assert_close(on_cpu(there), on_cpu(here))


@pytest.mark.parametrize("wakes", [False, True])
def test_what_a_mesh_leaves_whole_is_asked_for_without_waiting(wakes: bool) -> None:
    """As HSDP and TP do: a frozen weight that never had a gradient, and gradients that come as addends."""

    def body(rank: int) -> tuple[list[int], list[list[float]]]:
        with gpu() as device:
            axis, waits = init_device_mesh("cuda", (2,)), []

            def put(tensor: torch.Tensor, place: Placement) -> DTensor:
                return DTensor.from_local(tensor.to("cuda"), axis, [place], run_check=False)

            frozen, norm = (nn.Parameter(put(torch.ones(4), Replicate())) for _ in range(2))
            cut = nn.Parameter(put(torch.ones(2, 4), Shard(0)))
            frozen.requires_grad_(False)
            groups = [{"params": [("cut", cut)], "projected": True}, {"params": [("frozen", frozen), ("norm", norm)]}]
            optimizer = Frugal(groups, projection="columns", update_gap=100, lr=0.1)
            for step in range(5):
                if step == 3 and wakes:
                    frozen.requires_grad_(True)
                    frozen.grad = put(torch.ones(4), Replicate())
                cut.grad, norm.grad = put(torch.ones(2, 4), Shard(0)), put(torch.ones(4), Partial())
                device.syncs.clear()
                optimizer.step()
                waits.append(len(device.syncs))
            return waits, [on_cpu(one.detach().to_local()).tolist() for one in (frozen, norm)]

    for waits, (frozen, norm) in run_ranks(2, body):
        assert waits[0] and [bool(one) for one in waits[1:]] == [False, False, wakes, False]
        assert norm == pytest.approx([0.5] * 4, abs=1e-5) and frozen == pytest.approx([0.8 if wakes else 1.0] * 4)


def one_step(held: Held, start: Named, step: int) -> None:
    held.step({name: gradients()[step][name].to(one.device) for name, one in start.items()})


def test_clocks_that_an_engine_put_on_the_gpu_come_back() -> None:
    """As DeepSpeed's offload_states and reload_states do with all state."""
    case = Case("columns", "std", "reset", more=(("process_group", None),))
    with gpu() as device:
        start = {name: weights()[name].to("cuda") for name in ("tall", "norm")}
        held = LAYOUTS["replicas"](start, {"tall"}, case.options)
        one_step(held, start, 0)
        for store in held.optimizer.state.values():
            store.update({key: value.to("cuda") for key, value in store.items()})
        one_step(held, start, 1)
        device.syncs.clear()
        one_step(held, start, 2)
        assert not device.syncs


def test_offloaded_matrices_are_refreshed_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights and state lie on the CPU, an exact SVD is still the GPU's work."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        "frugal_dist.projection.svd.exact_svd", lambda grad, *rest: seen.append(grad) or exact_svd(grad, *rest)
    )
    case = Case("svd", "std", "reset", more=(("process_group", None),))
    with gpu():
        start = {name: weights()[name] for name in ("tall", "norm")}
        held = LAYOUTS["replicas"](start, {"tall"}, case.options)
        one_step(held, start, 0)
        assert [grad.is_cuda for grad in seen] == [True]
        assert all(not value.is_cuda for store in held.optimizer.state.values() for value in store.values())


def fails_on_a_gpu(body: Any) -> str:
    with gpu(), pytest.raises(AssertionError) as error:
        body()
    return str(error.value)


def test_the_pretended_gpu_is_strict() -> None:
    assert "mixes devices: cuda (3,), cpu (3,)" in fails_on_a_gpu(lambda: torch.ones(3, device="cuda") + torch.ones(3))
    with gpu() as device:
        value = torch.arange(6.0, device="cuda").view(2, 3)
        value[1].mul_(2)
        assert value.is_cuda and not device.syncs
        assert value.cpu().tolist() == [[0, 1, 2], [6, 8, 10]]
        assert float(value.sum()) == 27 and value[0].tolist() == [0, 1, 2]
        assert len(device.syncs) == 3

    def collectives(rank: int) -> list[str]:
        found = [fails_on_a_gpu(lambda: dist.all_reduce(torch.ones(2)))]
        return [*found, fails_on_a_gpu(lambda: dist.all_reduce(torch.ones(2, dtype=torch.bool, device="cuda")))]

    for cpu, dtype in run_ranks(2, collectives):
        assert "NCCL refuses it" in cpu and "NCCL does not have it" in dtype


def move_all(held: Held, device: str) -> None:
    """All state, the counts included, as trainers of several phases and DeepSpeed's offload_states move it."""
    for store in held.optimizer.state.values():
        for key, value in store.items():
            store[key] = value.to(device)


def state_of(held: Held) -> list[torch.Tensor]:
    return [value for store in held.optimizer.state.values() for value in store.values()]


def with_moves(layout: str, case: Case, away: str, back: str) -> tuple[Named, Named, list[str]]:
    """The weights after a refresh and a step, what was saved while the state was away, and what the step waited for."""
    with gpu() as device:
        start = {name: weights()[name].to("cuda") for name in reference(case, torch.float64)}
        held = LAYOUTS[layout](start, case.groups(), case.options)
        for step in range(GAP - 1):
            one_step(held, start, step)
        move_all(held, away)
        saved = {
            f"{number} {key}": on_cpu(value).clone()
            for number, store in held.optimizer.state_dict()["state"].items()
            for key, value in store.items()
        }
        move_all(held, back)
        for step in range(GAP - 1, GAP + 1):
            one_step(held, start, step)
        device.syncs.clear()
        one_step(held, start, GAP + 1)
        waits = list(device.syncs)
        assert all(value.is_cuda == (value.dim() > 0) for value in state_of(held))
        return {name: on_cpu(value) for name, value in held.full().items()}, saved, waits


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("layout", "back"),
    [(layout, back) for layout in ("replicas, shared state", "ZeRO-3", "Shard(0)") for back in ("cuda", "cpu")],
)
def test_state_that_was_moved_away(layout: str, back: str) -> None:
    """Brought back, or left on the CPU: the same bits, saved ones too, and no wait in later steps."""
    for case in CASES:
        stayed = run_ranks(2, lambda rank, case=case: with_moves(layout, case, "cuda", "cuda"))
        moved = run_ranks(2, lambda rank, case=case: with_moves(layout, case, "cpu", back))
        for want, found in zip(stayed, moved, strict=True):
            assert same(want[0], found[0]) and same(want[1], found[1]), case
            assert not found[2], case


def same(one: Named, other: Named) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_offload_states_does_with_ours() -> None:
    """At ZeRO-3, where DeepSpeed knows the state of its own Adam only."""
    case = Case("svd", "std", "reset", more=(("process_group", None),))
    with gpu():
        start = {name: weights()[name].to("cuda") for name in ("tall", "norm")}
        held = LAYOUTS["replicas"](start, {"tall"}, case.options)
        one_step(held, start, 0)
        there = [value.is_cuda for value in state_of(held)]
        hooks.move_state(held.optimizer, lambda value, param: hooks.to_host(value, True, False))
        assert any(there) and not any(value.is_cuda for value in state_of(held))
        hooks.move_state(held.optimizer, lambda value, param: value.to(param.device))
        assert there == [value.is_cuda for value in state_of(held)]
