"""The state: what it holds, how many bytes it takes, and how it survives a checkpoint."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from building import PROJECTIONS, build, counters, parameters_of, set_grads, train, weight, weights
from selection import taking_turns

from frugal_dist import Frugal, FrugalConfig
from frugal_dist.step.state import MatrixState
from frugal_dist.update.moment_storage import Extent

SHAPES = {"tall": (24, 16), "wide": (16, 40), "odd": (7, 5), "square": (12, 12)}


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Saved and read the strict way: plain tensors, numbers and containers only."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def build_all(dtype: torch.dtype = torch.float64, **options: Any) -> Frugal:
    matrices = {name: weight(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    return build(matrices, {"norm": weight(11, dtype=dtype)}, **options)


def copy_weights(source: Frugal, target: Frugal) -> None:
    with torch.no_grad():
        for a, b in zip(parameters_of(source), parameters_of(target), strict=True):
            b.copy_(a)


# resuming


@pytest.mark.parametrize("side", ["std", "full"])
@pytest.mark.parametrize(("projection", "steps"), taking_turns(PROJECTIONS, [1, 2, 3, 4, 6], every=2))
def test_a_resumed_run_is_the_same_run(projection: str, side: str, steps: int) -> None:
    """T = 3. Saved right after a refresh (1, 4), between (2), and right before one (3, 6): equal to the last bit."""
    options: dict[str, Any] = {"projection": projection, "side": side, "weight_decay": 0.1, "seed": 4}
    straight, resumed = build_all(**options), build_all(**options)
    train(straight, 1, steps)
    copy_weights(straight, resumed)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    for step in range(steps + 1, steps + 8):
        train(straight, step, step)
        train(resumed, step, step)
        for a, b in zip(weights(straight), weights(resumed), strict=True):
            assert torch.equal(a, b), f"step {step}"


@pytest.mark.parametrize("on_refresh", ["keep", "project"])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_resumed_run_that_carries_its_state_over(projection: str, on_refresh: str) -> None:
    """`project` needs the old selection at the refresh, which may be the first step after the resume."""
    straight, resumed = (build_all(projection=projection, on_refresh=on_refresh) for _ in range(2))
    train(straight, 1, 3)
    copy_weights(straight, resumed)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    train(straight, 4, 8)
    train(resumed, 4, 8)
    for a, b in zip(weights(straight), weights(resumed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("state_full", ["lion", "sgdm"])
def test_a_resumed_run_of_the_other_rules(state_full: str) -> None:
    straight, resumed = (build_all(projection="columns", state_full=state_full) for _ in range(2))
    train(straight, 1, 5)
    copy_weights(straight, resumed)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    train(straight, 6, 8)
    train(resumed, 6, 8)
    for a, b in zip(weights(straight), weights(resumed), strict=True):
        assert torch.equal(a, b)


def test_loading_over_a_run_that_went_elsewhere() -> None:
    """Nothing of the state before the load may survive it, cached selections included."""
    for projection in PROJECTIONS:
        straight, other = (build_all(projection=projection) for _ in range(2))
        train(straight, 1, 2)
        train(other, 11, 18)
        copy_weights(straight, other)
        other.load_state_dict(through_a_file(straight.state_dict()))
        train(straight, 3, 6)
        train(other, 3, 6)
        for a, b in zip(weights(straight), weights(other), strict=True):
            assert torch.equal(a, b), projection


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_loading_over_a_run_with_another_seed(projection: str) -> None:
    """As many refreshes, but other selections: the hyperparameters come with the state, and selections follow them."""
    straight, other = build_all(projection=projection, seed=1), build_all(projection=projection, seed=2)
    train(straight, 1, 2)
    train(other, 1, 2)
    copy_weights(straight, other)
    other.load_state_dict(through_a_file(straight.state_dict()))
    train(straight, 3, 6)
    train(other, 3, 6)
    for a, b in zip(weights(straight), weights(other), strict=True):
        assert torch.equal(a, b)


def test_a_state_dict_from_before_the_first_step() -> None:
    straight, resumed = build_all(), build_all()
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    train(straight, 1, 4)
    train(resumed, 1, 4)
    for a, b in zip(weights(straight), weights(resumed), strict=True):
        assert torch.equal(a, b)


def test_taking_a_state_dict_changes_nothing() -> None:
    for projection in PROJECTIONS:
        observed, alone = (build_all(projection=projection) for _ in range(2))
        for step in range(1, 8):
            observed.state_dict()
            train(observed, step, step)
            observed.state_dict()
            train(alone, step, step)
            for a, b in zip(weights(observed), weights(alone), strict=True):
                assert torch.equal(a, b), projection


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_state_holds_tensors_only(projection: str) -> None:
    """Checkpoint libraries drop or choke on anything else."""
    optimizer = build_all(projection=projection)
    train(optimizer, 1, 2)
    for state in optimizer.state_dict()["state"].values():
        assert state
        assert all(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_loading_keeps_the_dtypes_that_were_saved(projection: str, dtype: torch.dtype) -> None:
    """torch's own load casts state to the parameter's dtype: that would round fp32 moments to bf16."""
    optimizer, resumed = build_all(dtype, projection=projection), build_all(dtype, projection=projection)
    train(optimizer, 1, 2)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for a, b in zip(parameters_of(optimizer), parameters_of(resumed), strict=True):
        for key, value in optimizer.state[a].items():
            assert resumed.state[b][key].dtype == value.dtype, key
            assert torch.equal(resumed.state[b][key], value), key


def other_strides(value: torch.Tensor) -> torch.Tensor:
    return value.T.contiguous().T if value.dim() == 2 else value


def made_in_inference(value: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return value.clone()


def all_floats(value: torch.Tensor) -> torch.Tensor:
    """Also the counts, as casting everything leaves them."""
    return value.float()


@pytest.mark.parametrize("change", [other_strides, made_in_inference, all_floats])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_how_loaded_tensors_lie_does_not_matter(
    projection: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    alone, saved, resumed = (build_all(torch.float32, projection=projection, on_refresh="keep") for _ in range(3))
    train(alone, 1, 7)
    train(saved, 1, 4)
    train(resumed, 1, 4)
    state_dict = saved.state_dict()
    state_dict["state"] = {
        number: {key: change(value) for key, value in store.items()} for number, store in state_dict["state"].items()
    }
    with torch.inference_mode(change is made_in_inference):
        resumed.load_state_dict(state_dict)
    train(resumed, 5, 7)
    assert all(torch.equal(a, b) for a, b in zip(weights(alone), weights(resumed), strict=True))


def test_loaded_state_is_a_copy() -> None:
    source, target = build_all(), build_all()
    train(source, 1, 2)
    target.load_state_dict(source.state_dict())
    before = [value.clone() for p in parameters_of(source) for value in source.state[p].values()]
    train(target, 3, 3)
    after = [value for p in parameters_of(source) for value in source.state[p].values()]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_loading_restores_the_hyperparameters() -> None:
    source, target = build_all(density=0.5, lr=0.03), build_all(density=0.25, lr=0.01)
    train(source, 1, 1)
    target.load_state_dict(through_a_file(source.state_dict()))
    assert [group["lr"] for group in target.param_groups] == [0.03, 0.03]
    assert target.param_groups[0]["density"] == 0.5


def test_loading_the_state_of_another_model_is_refused() -> None:
    source = build({"a": weight(8, 6), "b": weight(8, 6)})
    train(source, 1, 1)
    with pytest.raises(ValueError, match="only there: b"):
        build({"a": weight(8, 6)}).load_state_dict(source.state_dict())


# what may be otherwise than it was


@pytest.mark.parametrize(("then", "now"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_another_precision_is_converted(projection: str, then: torch.dtype, now: torch.dtype) -> None:
    """Loaded right before a refresh, which keeps the moments, and between two; or cast in mid-run."""
    kept = "project" if projection == "svd" else "keep"  # the sign of a basis vector differs between precisions
    for rule in ("adamw", "lion", "sgdm"):
        options: dict[str, Any] = {
            "projection": projection,
            "on_refresh": kept,
            "state_full": rule,
            "state_free": "sgd",
        }
        for steps in (3, 5):
            straight, loaded, cast = (build_all(dtype, eps=1e-3, **options) for dtype in (then, now, then))
            train(straight, 1, steps)
            train(cast, 1, steps)
            copy_weights(straight, loaded)
            loaded.load_state_dict(through_a_file(straight.state_dict()))
            for parameter in parameters_of(cast):
                parameter.data, parameter.grad = parameter.data.to(now), None
            for optimizer in (straight, loaded, cast):
                train(optimizer, steps + 1, steps + 1)
            for a, b, c in zip(weights(straight), weights(loaded), weights(cast), strict=True):
                assert torch.allclose(a.double(), b.double(), atol=1e-5), (rule, steps)
                assert torch.equal(b, c)
            floats = [v for store in loaded.state.values() for v in store.values() if v.is_floating_point()]
            assert {value.dtype for value in floats} == {now}


def by_state_dict(optimizer: Frugal) -> Frugal:
    resumed = build_all(**{key: optimizer.defaults[key] for key in ("projection", "density")})
    copy_weights(optimizer, resumed)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    return resumed


def by_pickle(optimizer: Frugal) -> Frugal:
    copied: Frugal = pickle.loads(pickle.dumps(optimizer))
    return copied


@pytest.mark.parametrize("way", [by_state_dict, by_pickle, copy.deepcopy, copy.copy], ids=lambda way: way.__name__)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_density_changed_before_a_matrix_has_a_gradient(projection: str, way: Callable[[Frugal], Frugal]) -> None:
    """Its moments were made in the size of the first density, and are taken up in the size of the second."""

    def go_on(optimizer: Frugal, first: int, last: int) -> None:
        for step in range(first, last + 1):
            set_grads(optimizer, step)
            for parameter in parameters_of(optimizer)[1:3] if step < 4 else ():
                parameter.grad = None
            optimizer.step()

    optimizer = build_all(projection=projection, density=0.5)
    go_on(optimizer, 1, 1)
    optimizer.param_groups[0]["density"] = 0.75
    go_on(optimizer, 2, 2)
    alone = copy.deepcopy(optimizer)  # a shallow copy shares its moments with the original
    resumed = way(optimizer)
    go_on(alone, 3, 8)
    go_on(resumed, 3, 8)
    assert all(torch.equal(a, b) for a, b in zip(weights(alone), weights(resumed), strict=True))


def test_layers_in_another_order_are_found_by_name() -> None:
    """Their shapes are the same: by position each would get the other's moments."""

    def in_order(names: str, **options: Any) -> tuple[dict[str, Any], Frugal]:
        named = {name: weight(6, 6, seed=ord(name)) for name in names}
        return named, build({n: named[n] for n in names[:2]}, {n: named[n] for n in names[2:]}, **options)

    def step(named: dict[str, Any], optimizer: Frugal, number: int) -> None:
        for name, parameter in named.items():
            parameter.grad = weight(6, 6, seed=number + ord(name)).detach()
        optimizer.step()

    for projection in PROJECTIONS:
        (mine, saved), (others, loaded) = (in_order(names, projection=projection) for names in ("abcd", "badc"))
        for number in range(2):
            step(mine, saved, number)
        with torch.no_grad():
            for name in mine:
                others[name].copy_(mine[name])
        if projection == "blockwise":  # which blocks are active goes by their order
            with pytest.raises(ValueError, match="b stands elsewhere among the parameters"):
                loaded.load_state_dict(through_a_file(saved.state_dict()))
            continue
        loaded.load_state_dict(through_a_file(saved.state_dict()))
        for number in range(2, 6):
            step(mine, saved, number)
            step(others, loaded, number)
        assert all(torch.equal(mine[name], others[name]) for name in mine), projection


def test_hyperparameters_of_the_saved_run_are_told() -> None:
    saved = build_all(projection="randk", density=0.5, update_gap=3, seed=1, lr=0.1)
    train(saved, 1, 1)
    state_dict = through_a_file(saved.state_dict())
    loaded = build_all(projection="svd", density=0.25, update_gap=50, lr=0.01)
    with pytest.warns(UserWarning, match="hyperparameters of the saved run") as seen:
        loaded.load_state_dict(state_dict)
    (text,) = [str(warning.message) for warning in seen]
    for said in (
        "projection='randk' instead of 'svd' (fixed",
        "density=0.5 instead of 0.25;",
        "update_gap=3",
        "seed=1",
    ):
        assert said in text
    assert "lr=" not in text
    same = build_all(projection="randk", density=0.5, update_gap=3, seed=1, lr=0.01)
    same.load_state_dict(state_dict)  # warnings are errors here


def test_what_a_saved_group_does_not_say_is_the_programs() -> None:
    """States of older versions lack the hyperparameters that came later."""
    saved = build_all(rounding="stochastic", on_refresh="keep")
    state_dict = saved.state_dict()
    for group in state_dict["param_groups"]:
        del group["rounding"], group["param_names"]
    loaded = build_all(rounding="stochastic", on_refresh="keep")
    loaded.load_state_dict(state_dict)
    assert [group["rounding"] for group in loaded.param_groups] == ["stochastic"] * 2


# what is refused


def other_optimizer(saved: dict[str, Any]) -> None:
    for group in saved["param_groups"]:
        del group["projection"], group["density"]


def other_name(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["param_names"][2] = "renamed"


def other_group(saved: dict[str, Any]) -> None:
    first, second = (group["param_names"] for group in saved["param_groups"])
    first[0], second[0] = second[0], first[0]


def without_an_entry(saved: dict[str, Any]) -> None:
    del saved["state"][1]


def without_basis(saved: dict[str, Any]) -> None:
    del saved["state"][1]["basis"]


def without_step(saved: dict[str, Any]) -> None:
    del saved["state"][4]["step"]


def other_basis(saved: dict[str, Any]) -> None:
    saved["state"][1]["basis"] = saved["state"][1]["basis"].T.contiguous()


def transposed(saved: dict[str, Any]) -> None:
    """As many elements: a matrix that was 5x7 then."""
    saved["state"][2]["exp_avg"] = saved["state"][2]["exp_avg"].T.contiguous()


def resized(saved: dict[str, Any]) -> None:
    saved["state"][4]["exp_avg"] = torch.zeros(9)


def strange(saved: dict[str, Any]) -> None:
    saved["state"][1]["momentum_buffer"] = torch.zeros(16, 40)


def whole_checkpoint(saved: dict[str, Any]) -> None:
    inner = dict(saved)
    saved.clear()
    saved.update(model={}, optimizer=inner)


def bad_value(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["lr"] = "fast"


def rounded_count(saved: dict[str, Any]) -> None:
    """In bf16 257 is 256."""
    saved["state"][4]["step"] = torch.tensor(257, dtype=torch.bfloat16)


def no_tensor(saved: dict[str, Any]) -> None:
    """As torch.distributed.checkpoint makes of a key that it does not find."""
    saved["state"][4]["exp_avg_sq"] = {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_optimizer, "was saved by another optimizer"),
        (other_name, "only there: renamed; only here: odd"),
        (other_group, "was in group"),
        (without_an_entry, "wide: the loaded state has nothing for it"),
        (without_basis, "wide: the loaded basis has nothing"),
        (without_step, "norm: the loaded state has moments, but no step"),
        (other_basis, "wide: the loaded basis has shape"),
        (transposed, "odd: the loaded exp_avg has shape"),
        (resized, "norm: the loaded exp_avg has shape (9,), this rank needs (11,)"),
        (no_tensor, "parameter 4 has 'exp_avg_sq' of type dict, where a tensor belongs"),
        (
            whole_checkpoint,
            "has no 'state', but 'model', 'optimizer': it is not what state_dict() of an optimizer gave",
        ),
        (bad_value, "Group 1 of the loaded state: lr='fast' must be a number"),
        (rounded_count, "step=256.0 in torch.bfloat16, which is no exact count"),
        (strange, "wide: the loaded state has 'momentum_buffer'"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change: Callable[[dict[str, Any]], None], said: str) -> None:
    """By the name of the parameter; the optimizer trains on as if nothing had been tried."""
    saved, tried, alone = build_all(lr=0.5), build_all(), build_all()
    for optimizer, last in ((saved, 2), (tried, 3), (alone, 3)):
        train(optimizer, 1, last)
    state_dict = through_a_file(saved.state_dict())
    change(state_dict)
    with pytest.raises(ValueError) as error:
        tried.load_state_dict(state_dict)
    assert said in str(error.value)
    train(tried, 4, 7)
    train(alone, 4, 7)
    assert all(torch.equal(a, b) for a, b in zip(weights(tried), weights(alone), strict=True))


@pytest.mark.parametrize("projection", ["svd", "random", "dct"])
def test_state_saved_after_its_density_went_to_zero(projection: str) -> None:
    """The step refuses it, and so does the load: a basis projection has no basis then."""
    saved, loaded = build_all(projection=projection), build_all(projection=projection)
    train(saved, 1, 2)
    saved.param_groups[0]["density"] = 0.0
    with pytest.raises(ValueError, match="tall: a density schedule cannot go to 0"):
        loaded.load_state_dict(through_a_file(saved.state_dict()))


# parameters that are resized in place, as embeddings for new tokens are


def enlarge(parameter: Any, rows: int) -> None:
    parameter.data, parameter.grad = torch.cat([parameter.data, torch.ones(rows, *parameter.shape[1:])]), None


def test_resized_before_the_first_step() -> None:
    embedding, matrix = weight(5, 4, dtype=torch.float32), weight(6, 8, dtype=torch.float32)
    optimizer = build({"matrix": matrix}, {"embedding": embedding})
    enlarge(embedding, 3)
    enlarge(matrix, 2)
    straight = build({"matrix": torch.nn.Parameter(matrix.detach().clone())},
                     {"embedding": torch.nn.Parameter(embedding.detach().clone())})  # fmt: skip
    train(optimizer, 1, 4)
    train(straight, 1, 4)
    assert all(torch.equal(a, b) for a, b in zip(weights(optimizer), weights(straight), strict=True))
    assert [original.shape for original in optimizer.originals] == [(8, 8), (8, 4)]


@pytest.mark.parametrize("name", ["matrix", "embedding"])
def test_resized_while_training(name: str) -> None:
    embedding, matrix = weight(5, 4, dtype=torch.float32), weight(6, 8, dtype=torch.float32)
    optimizer = build({"matrix": matrix}, {"embedding": embedding})
    train(optimizer, 1, 2)
    enlarge({"matrix": matrix, "embedding": embedding}[name], 3)
    before = weights(optimizer)
    with pytest.raises(ValueError, match=f"{name} had shape .* at the last step"):
        train(optimizer, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights(optimizer), before, strict=True))


# clocks


def test_clocks_count_what_they_say() -> None:
    """step: since the last reset. updates: never reset. refreshes: how many. refreshed_at: when last."""
    optimizer = build_all()
    w = parameters_of(optimizer)[0]
    seen = []
    for step in range(1, 6):
        train(optimizer, step, step)
        seen.append(counters(optimizer, w))
    assert [c["step"] for c in seen] == [1, 2, 3, 1, 2]
    assert [c["updates"] for c in seen] == [1, 2, 3, 4, 5]
    assert [c["refreshes"] for c in seen] == [1, 1, 1, 2, 2]
    assert [c["refreshed_at"] for c in seen] == [0, 0, 0, 3, 3]


@pytest.mark.parametrize("on_refresh", ["keep", "project"])
def test_step_goes_on_where_the_state_does(on_refresh: str) -> None:
    optimizer = build_all(on_refresh=on_refresh)
    train(optimizer, 1, 5)
    assert counters(optimizer, parameters_of(optimizer)[0])["step"] == 5


def test_regular_parameters_are_never_reset() -> None:
    optimizer = build_all()
    train(optimizer, 1, 5)
    assert counters(optimizer, parameters_of(optimizer)[-1])["step"] == 5


# shapes and bytes


def low_rank_shape(projection: str, side: str, shape: tuple[int, int], density: float) -> tuple[int, ...]:
    rows, columns = shape
    if projection == "columns":
        return (rows, int(density * columns))
    if projection == "rows":
        return (int(density * rows), columns)
    if projection == "randk":
        return (int(density * rows * columns),)
    if side == "full":
        return (round(density * min(shape)),) * 2
    right = side == "right" or (side == "std" and rows >= columns)
    return (rows, round(density * columns)) if right else (round(density * rows), columns)


@pytest.mark.parametrize("side", ["std", "left", "right", "full"])
@pytest.mark.parametrize("projection", [p for p in PROJECTIONS if p != "blockwise"])
def test_moments_have_the_shape_of_the_projected_gradient(projection: str, side: str) -> None:
    optimizer = build_all(projection=projection, side=side, density=0.25)
    train(optimizer, 1, 2)
    for parameter, shape in zip(parameters_of(optimizer), SHAPES.values(), strict=False):
        expected = low_rank_shape(projection, side, shape, 0.25)
        assert optimizer.state[parameter]["exp_avg"].shape == expected
        assert optimizer.state[parameter]["exp_avg_sq"].shape == expected


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_state_takes_the_bytes_of_the_formula(projection: str) -> None:
    """float32: 8 bytes per stateful entry, 4 per entry of a basis, at most 4 per index of randk."""
    density = 0.25
    optimizer = build_all(torch.float32, projection=projection, density=density)
    train(optimizer, 1, 4)
    stateful = 11
    extra = 0
    for shape in SHAPES.values():
        if projection == "blockwise":
            continue
        low_rank = low_rank_shape(projection, "std", shape, density)
        stateful += torch.Size(low_rank).numel()
        side = min(shape)
        if projection in ("svd", "random"):
            extra += 4 * side * round(density * side)
        elif projection == "dct":
            extra += 4 * round(density * side)  # numbers of columns
        elif projection == "randk":
            extra += 4 * low_rank[0]
        else:
            extra += 8 * max(low_rank)
    if projection == "blockwise":
        active = [p for p in parameters_of(optimizer)[:-1] if optimizer.state[p].get("exp_avg", p[:0]).numel()]
        assert len(active) == 1
        stateful += active[0].numel()
    total, clocks = 0, {}
    for parameter in parameters_of(optimizer):
        for value in optimizer.state[parameter].values():
            storage = value.untyped_storage()
            if value.ndim == 0:  # they share one tensor
                clocks[storage.data_ptr()] = storage.nbytes()
            else:
                total += storage.nbytes()
    assert 8 * stateful <= total <= 8 * stateful + extra
    if projection in ("svd", "random", "dct"):
        assert total == 8 * stateful + extra
    assert sum(clocks.values()) <= 5 * 6 * 8, "a few counters for each of the five parameters"


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_state_dict_takes_no_memory_of_its_own(projection: str) -> None:
    optimizer = build_all(projection=projection)
    train(optimizer, 1, 2)
    live = {value.data_ptr() for store in optimizer.state.values() for value in store.values() if value.numel() > 1}
    saved = [value for store in optimizer.state_dict()["state"].values() for value in store.values()]
    assert {value.data_ptr() for value in saved if value.numel() > 1} == live


@pytest.mark.parametrize("state_full", ["lion", "sgdm"])
def test_rules_with_one_moment_store_one(state_full: str) -> None:
    optimizer = build_all(torch.float32, projection="columns", state_full=state_full)
    train(optimizer, 1, 1)
    for parameter in parameters_of(optimizer):
        assert "exp_avg_sq" not in optimizer.state[parameter]


def test_density_zero_stores_nothing_for_matrices() -> None:
    for projection in PROJECTIONS:
        optimizer = build_all(projection=projection, density=0.0)
        train(optimizer, 1, 2)
        for parameter in parameters_of(optimizer)[:-1]:
            assert sum(value.numel() for value in optimizer.state[parameter].values() if value.ndim) == 0, projection


def train_frozen(optimizer: Frugal, first: int, last: int, frozen_at: range) -> None:
    """The second matrix and the last regular parameter are frozen in the steps ``frozen_at``."""
    for step in range(first, last + 1):
        set_grads(optimizer, step)
        for parameter in (parameters_of(optimizer)[1], parameters_of(optimizer)[-1]):
            parameter.requires_grad_(step not in frozen_at)
            if step in frozen_at:
                parameter.grad = None
        optimizer.step()


def half_frozen(projection: str) -> Frugal:
    regular = {"norm": weight(11), "embedding": weight(9, 4, seed=7)}
    return build({"adapter": weight(8, 6), "base": weight(16, 12, seed=1)}, regular, projection=projection)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_frozen_parameters_have_counts_and_nothing_else(projection: str) -> None:
    """Beside adapters they are most of a model."""
    optimizer = half_frozen(projection)
    train_frozen(optimizer, 1, 5, range(1, 6))
    saved = optimizer.state_dict()["state"]
    for number in (1, 3):
        live = optimizer.state[parameters_of(optimizer)[number]]
        for store in (live, saved[number]):
            assert all(value.ndim == 0 for value in store.values()), list(store)
        assert sum(value.untyped_storage().nbytes() for value in saved[number].values()) <= 5 * 8
    assert optimizer.state[parameters_of(optimizer)[2]]["exp_avg"].numel() == 11


@pytest.mark.parametrize("saved_after", [2, 4, 6])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_run_that_freezes_is_resumed(projection: str, saved_after: int) -> None:
    """Frozen in steps 1-3 and 6-7: saved before it has moments, while it trains, and frozen with moments."""
    straight, resumed = half_frozen(projection), half_frozen(projection)
    for optimizer, first, last in ((straight, 1, 9), (resumed, 1, saved_after)):
        for step in range(first, last + 1):
            train_frozen(optimizer, step, step, range(1, 4) if step < 6 else range(6, 8))
    again = half_frozen(projection)
    copy_weights(resumed, again)
    again.load_state_dict(through_a_file(resumed.state_dict()))
    for step in range(saved_after + 1, 10):
        train_frozen(again, step, step, range(1, 4) if step < 6 else range(6, 8))
    for a, b in zip(weights(straight), weights(again), strict=True):
        assert torch.equal(a, b)


def test_inactive_blocks_store_nothing() -> None:
    optimizer = build_all(projection="blockwise", density=0.25, block_order="ascending")
    train(optimizer, 1, 4)
    sizes = [sum(v.numel() for v in optimizer.state[p].values() if v.ndim) for p in parameters_of(optimizer)]
    assert sizes == [0, 2 * 16 * 40, 0, 0, 2 * 11], "the first block's state is freed when the second becomes active"


def test_as_many_moments_that_are_selected_otherwise_have_the_shape_that_is_asked_for() -> None:
    """A rank's part of a matrix at density 1, and of single entries afterwards: loading looks at the shape."""
    state = MatrixState({})
    for shape in ((1, 4), (4,)):
        state.ensure_moments(FrugalConfig(projection="randk"), [Extent(shape)], torch.float64, torch.device("cpu"))
        moment = state.get("exp_avg")
        assert moment is not None and moment.shape == shape
