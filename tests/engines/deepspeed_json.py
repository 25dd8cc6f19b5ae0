"""Jobs about the optimizer section of DeepSpeed configs."""

from __future__ import annotations

import contextlib
import gc
import io
import warnings
from collections.abc import Iterator
from typing import Any

import deepspeed_cases as cases
import torch

OTHER = {
    "lr": 3e-3, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.05, "density": 0.5, "update_gap": 4,
    "projection": "random", "side": "left", "block_order": "mirror", "state_full": "lion", "state_free": "none",
    "momentum": 0.7, "projected_lr_scale": 0.5, "state_free_lr_scale": 0.1, "on_refresh": "keep", "svd_method": "exact",
    "basis_dtype": "bf16", "matmul": "bf16x3", "rounding": "stochastic", "refresh_schedule": "staggered",
    "compute_layout": "cut", "residual_threshold": 0.001, "combine": "scale", "growth_limit": 1.01, "seed": 7,
    "moments": "8bit",
}  # fmt: skip
"""Every hyperparameter, none at its default where there is a choice."""


def groups_after(params: dict[str, Any], zero: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """The parameter groups of the optimizer that DeepSpeed builds from JSON, after one step."""
    ranks = torch.distributed.get_world_size()
    engine = cases.start(cases.config_of(params, zero, ranks, **more))
    assert type(engine.basic_optimizer).__name__ == "Frugal"
    cases.train(engine, range(1))
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in engine.basic_optimizer.param_groups
    ]
    engine.destroy()
    return groups


def error_of(params: dict[str, Any], zero: dict[str, Any], more: dict[str, Any], steps: int = 0) -> str:
    """What the user reads, from deepspeed.initialize or from the first ``steps`` steps."""
    from deepspeed.runtime import torch_autocast
    from deepspeed.utils import groups

    ranks, before, autocast = torch.distributed.get_world_size(), dict(vars(groups)), dict(vars(torch_autocast))
    engine = None
    try:
        engine = cases.start(cases.config_of(params, zero, ranks, **more))
        cases.train(engine, range(steps))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        vars(groups).update(before)  # AutoTP leaves its process groups for all engines to come
        vars(torch_autocast).update(autocast)  # with it engines to come would not clip
        if engine is not None:
            engine.destroy()
    return ""


def error_of_tp_model_init(zero: dict[str, Any]) -> str:
    """Tensor parallelism that the script asks for by a call, and not the config."""
    import deepspeed
    from deepspeed.runtime.tensor_parallel import init_utils

    ranks = torch.distributed.get_world_size()
    group = torch.distributed.new_group(list(range(ranks)))
    deepspeed.tp_model_init(cases.small_llama(), tp_size=ranks, dtype=torch.float32, tp_group=group)
    try:
        return error_of({"lr": 1e-3}, zero, {"train_micro_batch_size_per_gpu": 12})
    finally:
        init_utils._TP_MODEL_INIT_ARGS = None  # else it counts for all engines to come


def error_of_client(path: str, zero: dict[str, Any]) -> tuple[str, bool]:
    """With an optimizer from the script, an object or a callable: what the user reads, and is it before any step?"""
    from frugal_dist import Frugal, split_parameters

    model, ranks = cases.small_llama(), torch.distributed.get_world_size()
    config = cases.config_of({}, zero, ranks)
    del config["optimizer"]
    engine = None
    try:
        given: Any = Frugal(split_parameters(model)) if path == "object" else Frugal
        engine = cases.start(config, model, optimizer=given, model_parameters=list(model.parameters()))
        cases.train(engine, range(1))
    except ValueError as error:
        return str(error), engine is None
    finally:
        if engine is not None:
            engine.destroy()
    return "", False


def refused_and_then_built(zero: dict[str, Any]) -> tuple[str, int]:
    """A user who reads the error, corrects the config and tries again in the same process."""
    told = error_of({}, zero, {})
    engine = cases.start(cases.config_of({}, {"stage": zero["stage"]}, torch.distributed.get_world_size()))
    cases.train(engine, range(1))
    steps = int(engine.global_steps)
    engine.destroy()
    return told, steps


def names_while_another_engine_goes() -> list[str]:
    """Collecting any engine makes DeepSpeed forget the names of all parameters; here just before ours is built."""
    ranks = torch.distributed.get_world_size()
    config = cases.config_of({}, {"stage": 1}, ranks)
    others = [cases.start(config)]
    model = cases.small_llama()

    def parameters() -> Iterator[torch.Tensor]:
        yield from model.parameters()
        others.clear()
        gc.collect()

    engine = cases.start(config, model, model_parameters=parameters())
    names = [row.name for row in engine.basic_optimizer.parameter_report_rows()]
    engine.destroy()
    return names


def decays(patterns: list[str]) -> list[set[str]]:
    """Which parameters decay, on each of the ways in: JSON, a callable, an object, groups of split_parameters."""
    from frugal_dist import Frugal, split_parameters

    ranks = torch.distributed.get_world_size()
    options = {"no_decay": patterns, "weight_decay": 0.5}
    optimizers = [
        Frugal(cases.small_llama().named_parameters(), **options),
        Frugal(split_parameters(cases.small_llama()), **options),
    ]
    plain = cases.config_of(options, {"stage": 2}, ranks)
    engines = [cases.start(plain)]
    del plain["optimizer"]
    model = cases.small_llama()
    engines.append(
        cases.start(plain, model, optimizer=lambda p: Frugal(p, **options), model_parameters=list(model.parameters()))
    )
    optimizers += [engine.basic_optimizer for engine in engines]
    found = [{row.name for row in optimizer.parameter_report_rows() if row.decay} for optimizer in optimizers]
    for engine in engines:
        engine.destroy()
    return found


def error_of_groups(params: dict[str, Any], zero: dict[str, Any]) -> str:
    """What the user reads whose script gives the groups of split_parameters."""
    from frugal_dist import split_parameters

    model = cases.small_llama()
    config = cases.config_of(params, zero, torch.distributed.get_world_size())
    try:
        cases.start(config, model, model_parameters=split_parameters(model))
    except ValueError as error:
        return str(error)
    return ""


def told_by(params: dict[str, Any], zero: dict[str, Any]) -> tuple[dict[str, bool], list[str], str]:
    """Which parameters JSON's patterns project, what was warned of, and what stood on stderr after two steps.

    The group that the script gives has a key of timm's.
    """
    ranks, model, err = torch.distributed.get_world_size(), cases.small_llama(), io.StringIO()
    groups = [{"params": list(model.parameters()), "lr_scale": 0.5}]
    with warnings.catch_warnings(record=True) as told, contextlib.redirect_stderr(err):
        warnings.simplefilter("always")
        engine = cases.start(cases.config_of(params, zero, ranks), model, model_parameters=groups)
        cases.train(engine, range(2))
    frugal = engine.basic_optimizer
    assert {group["lr_scale"] for group in frugal.param_groups} == {0.5}
    assert all(group["projected_lr_scale"] == params.get("lr_scale", 1.0) for group in frugal.param_groups)
    found = {row.name: row.projected for row in frugal.parameter_report_rows()}
    engine.destroy()
    said = [line for line in err.getvalue().splitlines() if line.startswith("frugal_dist")]
    return found, [str(one.message) for one in told], "\n".join(said)


def trains(config: dict[str, Any]) -> tuple[int, bool, list[str]]:
    """Three steps with a config as shipped, but for its batch size: (steps done, all weights finite, those unmoved)."""
    from deepspeed_faults import cpu_does_fp16

    config = {key: value for key, value in config.items() if key != "train_micro_batch_size_per_gpu"}
    config["train_batch_size"] = cases.ROWS
    with cpu_does_fp16():
        engine = cases.start(config)
        before = cases.full_weights(engine)
        cases.train(engine, range(3))
    after = cases.full_weights(engine)
    steps = int(engine.global_steps - engine.skipped_steps)
    engine.destroy()
    finite = all(bool(torch.isfinite(value).all()) for value in after.values())
    return steps, finite, [name for name in after if torch.equal(before[name], after[name])]


def factors(scheduler: dict[str, Any], steps: list[int]) -> list[float]:
    """The factor on the rate that DeepSpeed makes of this section, at each of these steps (from 0)."""
    from deepspeed.runtime import lr_schedules

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    built = getattr(lr_schedules, scheduler["type"])(optimizer, **scheduler["params"])
    found = []
    for step in steps:
        built.step(step - 1)  # DeepSpeed calls it after each step
        found.append(float(optimizer.param_groups[0]["lr"]))
    return found
