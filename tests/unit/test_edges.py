"""Odd shapes, dtypes, memory layouts and gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from building import DENSITY, PROJECTIONS, build, counters, parameters_of, set_grads, train, weight, weights
from torch.utils._python_dispatch import TorchDispatchMode

from frugal_dist import Frugal

# shapes


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (2, 3)])
def test_tiny_matrices_with_full_density(projection: str, shape: tuple[int, int]) -> None:
    w = weight(*shape)
    before = w.detach().clone()
    optimizer = build({"w": w}, projection=projection, density=1.0)
    train(optimizer, 1, 4)
    assert torch.isfinite(w).all()
    assert not torch.equal(w, before)


@pytest.mark.parametrize("projection", ["svd", "dct", "random"])
@pytest.mark.parametrize("side", ["std", "full"])
def test_full_density_leaves_no_residual(projection: str, side: str) -> None:
    """But rounding noise, whose signs would be steps of their own."""
    found = []
    for state_free in ("sign", "none"):
        w = {"w": weight(12, 12 if side == "full" else 8)}
        train(build(w, projection=projection, side=side, density=1.0,
                    state_free=state_free, update_gap=2), 1, 3)  # fmt: skip
        found.append(w["w"].detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("projection", ["svd", "dct", "random", "randperm", "columns", "rows", "randk"])
def test_a_selection_of_nothing_is_an_error_that_names_the_parameter(projection: str) -> None:
    with pytest.raises(ValueError, match=r"layer\.tiny"):
        train(build({"layer.tiny": weight(4, 4)}, projection=projection, density=0.05), 1, 1)


@pytest.mark.parametrize(("side", "shape"), [("right", (4, 16)), ("left", (16, 4))])
def test_a_rank_above_the_smaller_dimension_is_an_error(side: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"layer\.wide"):
        train(build({"layer.wide": weight(*shape)}, projection="svd", side=side, density=0.5), 1, 1)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_an_empty_parameter_is_left_alone(projection: str) -> None:
    empty, w = weight(0), weight(6, 4)
    optimizer = build({"w": w}, {"empty": empty}, projection=projection, density=1.0)
    train(optimizer, 1, 4)
    assert torch.isfinite(w).all()
    assert empty.shape == (0,)


@pytest.mark.parametrize("shape", [(0, 5), (6, 0), (2, 0, 4), (0, 3, 4)])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_an_empty_matrix_or_stack_is_left_alone(projection: str, shape: tuple[int, ...]) -> None:
    """Also where its matrices would be too small for the density, had it any."""
    empty, w, alone = weight(*shape), weight(6, 4), weight(6, 4)
    density = 1.0 if projection == "blockwise" else 0.3
    both, single = (
        build(matrices, projection=projection, density=density) for matrices in ({"w": w, "e": empty}, {"w": alone})
    )
    for optimizer in (both, single):
        train(optimizer, 1, 3)
    assert torch.equal(w, alone)
    both.load_state_dict(both.state_dict())
    train(both, 4, 5)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_gradient_decides_not_requires_grad(projection: str, frozen: bool) -> None:
    """As with torch's optimizers: outer optimizers give gradients to detached copies, which require none."""
    w, same = weight(8, 6), weight(8, 6)
    w.requires_grad_(not frozen)
    for parameter in (w, same):
        others = {"bias": weight(3).requires_grad_(not frozen)}
        optimizer = build(
            {"w": parameter}, others, projection=projection, density=1.0 if projection == "blockwise" else 0.5
        )
        train(optimizer, 1, 7)
    assert torch.equal(w, same)


def test_no_parameters_at_all_is_an_error_like_in_torch() -> None:
    with pytest.raises(ValueError, match="empty"):
        Frugal([])


@pytest.mark.parametrize("side", ["std", "left", "full"])
@pytest.mark.parametrize("projection", ["svd", "columns", "rows"])
def test_a_stack_is_the_same_as_its_matrices(projection: str, side: str) -> None:
    """Weights of experts: one 3-D parameter. Full density where the names would draw different coordinates."""
    density = DENSITY if projection == "svd" else 1.0
    eps = 1e-3 if side == "full" else 1e-8
    stack = weight(3, 8, 6)
    apart = {f"w{i}": torch.nn.Parameter(stack.detach()[i].clone()) for i in range(3)}
    together = build({"experts": stack}, projection=projection, side=side, density=density, eps=eps)
    separate = build(apart, projection=projection, side=side, density=density, eps=eps)
    for step in range(1, 8):
        grad = weight(3, 8, 6, seed=step).detach()
        stack.grad = grad
        for i, w in enumerate(apart.values()):
            w.grad = grad[i].clone()
        together.step()
        separate.step()
        expected = torch.stack([w.detach() for w in apart.values()])
        assert torch.allclose(stack.detach(), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_stack_runs_with_every_projection(projection: str) -> None:
    stack, w = weight(3, 8, 6), weight(8, 6)
    optimizer = build({"experts": stack, "w": w}, projection=projection)
    before = stack.detach().clone()
    train(optimizer, 1, 7)
    assert torch.isfinite(stack).all()
    for i in range(3):
        assert not torch.equal(stack[i], before[i])


# memory layout, dtype


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_transposed_weights_and_gradients(projection: str) -> None:
    """The memory layout must not change the result: weights or gradients that are views of a transpose."""
    plain = [weight(8, 6), weight(6, 10, seed=1)]
    turned = [torch.nn.Parameter(w.detach().T.contiguous().T) for w in plain]
    assert not turned[0].is_contiguous()
    optimizers = [build({"a": a, "b": b}, projection=projection) for a, b in (plain, turned)]
    for step in range(1, 8):
        for optimizer in optimizers:
            set_grads(optimizer, step)
        for w in turned:
            assert w.grad is not None
            w.grad = w.grad.T.contiguous().T
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(plain, turned, strict=True):
        assert torch.allclose(a, b, atol=1e-12, rtol=0)


def test_an_expanded_gradient() -> None:
    """`weight.sum().backward()` gives a gradient whose entries all share one place in memory."""
    w, copy = weight(8, 6), weight(8, 6)
    first, second = build({"w": w}, projection="columns"), build({"w": copy}, projection="columns")
    w.sum().backward()
    copy.grad = torch.ones(8, 6, dtype=torch.float64)
    first.step()
    second.step()
    assert torch.equal(w, copy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_every_float_dtype(projection: str, dtype: torch.dtype) -> None:
    """One step in a short dtype is the float64 step, rounded. SGD as state-free rule: it has no jumps."""
    w, exact = weight(8, 6, dtype=dtype), weight(8, 6)
    exact.data.copy_(w.detach())
    density = 1.0 if projection == "blockwise" else DENSITY
    # A large lr: every factor of the update must show above the rounding of the weight.
    options: dict[str, Any] = {"projection": projection, "state_free": "sgd", "eps": 1e-2, "density": density}
    options |= {"lr": 0.5, "weight_decay": 0.2, "lr_scale": 0.7, "state_free_lr_scale": 0.6}
    first, second = build({"w": w}, {"b": weight(5, dtype=dtype)}, **options), build({"w": exact}, **options)
    w.grad = weight(8, 6, seed=4, dtype=dtype).detach()
    exact.grad = w.grad.double()
    first.step()
    second.step()
    assert w.dtype == dtype
    distance = (w.detach().double() - exact.detach()).abs().max()
    assert distance <= 4 * torch.finfo(dtype).eps * exact.detach().abs().max()


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_several_dtypes_in_one_optimizer(projection: str) -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    mixed = {str(dtype): weight(8, 6, dtype=dtype) for dtype in dtypes}
    optimizer = build(mixed, {"b32": weight(5, dtype=torch.float32), "b64": weight(5)}, projection=projection)
    alone = {name: torch.nn.Parameter(w.detach().clone()) for name, w in mixed.items()}
    train(optimizer, 1, 4)
    if projection == "blockwise":  # which matrix is active depends on how many there are
        assert all(torch.isfinite(w).all() for w in mixed.values())
        return
    for index, (name, w) in enumerate(alone.items()):
        single = build({name: w}, projection=projection)
        for step in range(1, 5):
            generator = torch.Generator().manual_seed(7919 * step + index)
            w.grad = torch.randn(8, 6, generator=generator, dtype=torch.float64).to(w.dtype)
            single.step()
        assert torch.equal(w, mixed[name])


def test_integer_parameters_are_refused_or_left_alone() -> None:
    counts = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)
    optimizer = build({"w": weight(8, 6)}, {"counts": counts})
    optimizer.param_groups[0]["params"][0].grad = torch.ones(8, 6, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(counts, torch.ones(4, 4, dtype=torch.int64))


# gradients


@pytest.mark.parametrize("projection", [p for p in PROJECTIONS if p != "blockwise"])
def test_a_step_without_gradient_does_not_count(projection: str) -> None:
    """Steps without a gradient leave weight and clock alone: the rest is the run without those steps."""
    skipping, straight = weight(8, 6), weight(8, 6)
    first = build({"w": skipping}, projection=projection, weight_decay=0.1)
    second = build({"w": straight}, projection=projection, weight_decay=0.1)
    for step in range(1, 9):
        set_grads(second, step)
        second.step()
        for _ in range(step % 3):
            before = skipping.detach().clone()
            skipping.grad = None
            first.step()
            assert torch.equal(skipping, before)
        set_grads(first, step)
        first.step()
        assert torch.equal(skipping, straight)
    assert counters(first, skipping) == counters(second, straight)
    assert counters(first, skipping)["updates"] == 8


def test_one_parameter_without_gradient_does_not_disturb_the_others() -> None:
    a, b, alone = weight(8, 6), weight(6, 8, seed=1), weight(8, 6)
    both, single = build({"a": a, "b": b}), build({"a": alone})
    for step in range(1, 8):
        for optimizer in (both, single):
            set_grads(optimizer, step)
        if step % 2 == 0:
            b.grad = None
        both.step()
        single.step()
    assert torch.equal(a, alone)
    assert counters(both, a)["updates"] == 7
    assert counters(both, b)["updates"] == 4


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_frozen_parameter_that_is_unfrozen_later(projection: str) -> None:
    w, frozen = weight(8, 6), weight(8, 6, seed=1)
    frozen.requires_grad_(False)
    optimizer = build({"w": w, "frozen": frozen}, projection=projection, weight_decay=0.1)
    before = frozen.detach().clone()
    for step in range(1, 5):
        set_grads(optimizer, step)
        frozen.grad = None
        optimizer.step()
        assert torch.equal(frozen, before)
    frozen.requires_grad_(True)
    train(optimizer, 5, 9)
    assert torch.isfinite(frozen).all()
    assert not torch.equal(frozen, before)


@pytest.mark.parametrize("projected", [True, False])
def test_a_sparse_gradient_is_a_clear_error(projected: bool) -> None:
    w = weight(8, 6)
    optimizer = Frugal(
        [
            {"params": [("embed.weight", w)], "projected": projected},
            {"params": [("q_proj.weight", weight(8, 6))], "projected": True},
        ]
    )
    w.grad = torch.ones(8, 6, dtype=torch.float64).to_sparse()
    with pytest.raises(ValueError, match=r"(?s)(?=.*sparse)(?=.*embed\.weight)"):
        optimizer.step()


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("state_free", ["sign", "sgd", "none"])
@pytest.mark.parametrize("state_full", ["adamw", "lion", "sgdm"])
def test_gradients_are_not_changed(projection: str, state_free: str, state_full: str) -> None:
    """Accumulation and logging use the same tensors after the step."""
    optimizer = build(
        {"a": weight(8, 6), "b": weight(6, 8, seed=1)}, {"c": weight(5)}, projection=projection, state_free=state_free,
        state_full=state_full,
    )  # fmt: skip
    for step in range(1, 5):
        set_grads(optimizer, step)
        grads = [p.grad for p in parameters_of(optimizer)]
        before = [grad.clone() for grad in grads if grad is not None]
        optimizer.step()
        for parameter, grad, expected in zip(parameters_of(optimizer), grads, before, strict=True):
            assert parameter.grad is grad
            assert torch.equal(expected, grad)


def test_state_never_shares_memory_with_a_gradient() -> None:
    """SGDM starts its buffer at the gradient: a copy, or `zero_grad(set_to_none=False)` would wipe the state."""
    for projection in PROJECTIONS:
        optimizer = build({"w": weight(8, 6)}, {"b": weight(5)}, projection=projection, state_full="sgdm", density=1.0)
        train(optimizer, 1, 1)
        before = [value.clone() for p in parameters_of(optimizer) for value in optimizer.state[p].values()]
        optimizer.zero_grad(set_to_none=False)
        after = [value for p in parameters_of(optimizer) for value in optimizer.state[p].values()]
        for expected, value in zip(before, after, strict=True):
            assert torch.equal(expected, value), projection


# global settings of the process


@contextlib.contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
        assert torch.get_float32_matmul_precision() == precision, "step() must leave the global setting as it was"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("side", ["std", "left", "full"])
@pytest.mark.parametrize("projection", ["svd", "dct", "random"])
def test_reduced_matmul_precision_changes_nothing(projection: str, side: str) -> None:
    """TF32 flips 13-40 % of the residual's signs, bf16 37-49 %: a step always computes in full float32."""

    def run() -> torch.Tensor:
        w = weight(96, 80, dtype=torch.float32)
        optimizer = build({"w": w}, projection=projection, side=side, density=0.25)
        train(optimizer, 1, 4)
        return w.detach()

    expected = run()
    with float32_precision("medium"):
        assert torch.equal(run(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(), expected)
        probe = torch.ones(2, 2) @ torch.ones(2, 2)
        assert probe.dtype == torch.bfloat16, "step() must leave autocast on"


class PrecisionProbe(TorchDispatchMode):
    """Notes the precision that is set at the moment of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
            self.seen.append((backends[0].fp32_precision, backends[1].fp32_precision))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_refresh", ["reset", "project"])
def test_every_matrix_product_of_a_step_is_a_full_one(on_refresh: str) -> None:
    """Few CPUs compute worse when asked to, so the test above alone would not notice on the others, nor for a GPU."""
    optimizer = build({"w": weight(8, 6, dtype=torch.float32)}, on_refresh=on_refresh)
    with float32_precision("medium"), PrecisionProbe() as probe:
        train(optimizer, 1, 4)
    assert len(probe.seen) >= 3 * 4
    assert set(probe.seen) == {("ieee", "ieee")}


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_default_dtype_and_the_global_generator_are_not_used(projection: str) -> None:
    def run() -> list[torch.Tensor]:
        shapes = {"a": (8, 6), "b": (6, 8), "large": (160, 120)}  # many entries are drawn in another way
        matrices = {name: weight(*shape, dtype=torch.float32) for name, shape in shapes.items()}
        optimizer = build(matrices, projection=projection)
        train(optimizer, 1, 4)
        return weights(optimizer)

    torch.manual_seed(0)
    expected = run()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        actual = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(expected, actual, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"projection": p} for p in PROJECTIONS] + [{"svd_method": "subspace"}], ids=str)
def test_a_default_device_is_not_used(options: dict[str, str]) -> None:
    """torch.set_default_device("cuda") is common; draws are made on the CPU, and counts stay there."""
    optimizer = build({"a": weight(8, 6), "large": weight(160, 120)}, {"bias": weight(5)}, **options)
    with torch.device("meta"):
        optimizer.step()  # creates the state
    for step in range(1, 5):
        set_grads(optimizer, step)
        with torch.device("meta"):
            optimizer.step()
    state = [value for parameter in parameters_of(optimizer) for value in optimizer.state[parameter].values()]
    assert {value.device.type for value in [*state, *weights(optimizer)]} == {"cpu"}


@pytest.mark.parametrize("on_refresh", ["keep", "reset"])
def test_blocks_whose_density_is_scheduled_to_zero(on_refresh: str) -> None:
    """The remaining steps are state-free; a resume in between changes nothing."""
    runs = [build({f"w{i}": weight(8, 6, seed=i) for i in range(4)}, projection="blockwise", on_refresh=on_refresh,
                  density=0.5) for _ in range(2)]  # fmt: skip
    for number, optimizer in enumerate(runs):
        train(optimizer, 1, 4)
        optimizer.param_groups[0]["density"] = 0.0
        if number:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = [value.clone() for value in weights(optimizer)]
        train(optimizer, 5, 8)
        moved = [(new - old).abs().max() for new, old in zip(weights(optimizer), before, strict=True)]
        assert all(distance > 0 for distance in moved)
    for one, other in zip(weights(runs[0]), weights(runs[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_low_precision_weights_are_rounded_once_a_step(projection: str) -> None:
    """lr x decay is below bf16's last place: rounded by itself, weight decay would be lost."""
    shapes, moved = {"one": (32, 24), "other": (24, 32), "b": (40,)}, []
    for dtype in (torch.float32, torch.bfloat16):
        start = {name: weight(*shape, dtype=torch.bfloat16).detach().to(dtype) for name, shape in shapes.items()}
        named = {name: torch.nn.Parameter(value) for name, value in start.items()}
        optimizer = build(
            {name: named[name] for name in ("one", "other")}, {"b": named["b"]},
            projection=projection, lr=1e-2, weight_decay=0.1,
        )  # fmt: skip
        for number, parameter in enumerate(parameters_of(optimizer)):
            generator = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16().to(dtype)
        optimizer.step()
        moved.append(weights(optimizer))
    for wide, narrow in zip(*moved, strict=True):
        assert torch.equal(wide.bfloat16(), narrow)


def test_an_inherited_precision_stays_inherited() -> None:
    """A step must not fix what torch.backends.fp32_precision says for all at that moment."""
    backend = torch.backends.cuda.matmul
    before, backend.fp32_precision = backend.fp32_precision, "none"
    torch.backends.fp32_precision = "tf32"
    try:
        train(build({"w": weight(8, 6)}), 1, 1)
        assert backend.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert backend.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision, backend.fp32_precision = "none", before


def test_a_step_under_inference_of_gradients_builds_no_graph() -> None:
    optimizer = build({"w": weight(8, 6)}, {"b": weight(5)})
    with torch.enable_grad():
        train(optimizer, 1, 4)
    for parameter in parameters_of(optimizer):
        assert parameter.grad_fn is None
        assert parameter.requires_grad
        assert not any(value.requires_grad for value in optimizer.state[parameter].values())


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_float64_gradients_beyond_the_range_of_float32(scale: float) -> None:
    """They are neither zero nor infinite: the refresh takes place, and the scale changes nothing."""
    w, ordinary = weight(8, 6), weight(8, 6)
    extreme, plain = build({"w": w}, eps=0.0), build({"w": ordinary}, eps=0.0)
    for step in range(1, 5):
        ordinary.grad = weight(8, 6, seed=step).detach()
        w.grad = scale * ordinary.grad
        extreme.step()
        plain.step()
    assert counters(extreme, w)["refreshes"] == 2
    assert torch.allclose(w, ordinary, atol=1e-10, rtol=0)


def test_a_step_in_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    w = {"w": weight(8, 6)}
    optimizer = build(w)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="Capture forward and backward alone"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_a_compiled_training_step_calls_it_as_it_is() -> None:
    plain, compiled = (build({"w": weight(8, 6)}, {"bias": weight(5)}, projection="svd") for _ in range(2))

    @torch.compile(backend="eager")
    def training_step() -> None:
        compiled.step()

    for step in range(1, 5):
        for optimizer in (plain, compiled):
            set_grads(optimizer, step)
        plain.step()
        training_step()
    for one, other in zip(weights(plain), weights(compiled), strict=True):
        assert torch.equal(one, other)
