"""Jobs that break something on one rank, and report what every rank saw."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed_cases as cases
import torch
from torch import Tensor

VICTIM = "model.layers.0.mlp.up_proj.weight"
HALF = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 10, "hysteresis": 1}}
NO_CHECK = {"bf16": {"enabled": True, "check_grad_overflow": False}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}

Config = tuple[int, dict[str, Any]]
FP16: dict[str, Config] = {f"{stage}, fp16": (stage, HALF) for stage in (1, 2, 3)}
CHECKED: dict[str, Config] = {
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    "2, bf16": (2, cases.BF16),
    "0, bf16, no check": (0, NO_CHECK),
    "3, bf16, no check": (3, NO_CHECK),
    "BF16_Optimizer, no check": (1, {**NO_CHECK, **FP32_SUMS}),
}
"""Where DeepSpeed looks for overflow, sometimes although it was told not to."""
UNCHECKED: dict[str, Config] = {
    "0": (0, {}),
    "1, bf16, no check": (1, NO_CHECK),
    "2, bf16, no check": (2, NO_CHECK),
}
SITUATIONS = {**FP16, **CHECKED, **UNCHECKED}


@dataclass(frozen=True)
class Outcome:
    """What one rank saw. ``moved``: which of the victim's weights changed in the bad step, ``others`` likewise."""

    skipped: int
    moved: bool
    others: bool
    counts: tuple[tuple[str, int], ...]
    finite: bool
    digest: str
    learns: bool


@contextmanager
def cpu_does_fp16() -> Iterator[None]:
    """DeepSpeed refuses fp16 on CPUs, which is slow there but works."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    old = kind.is_fp16_supported, kind.supported_dtypes
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: [torch.float, torch.half, torch.bfloat16]
    try:
        yield
    finally:
        kind.is_fp16_supported, kind.supported_dtypes = old


@contextmanager
def poisoned(engine: Any, name: str, rank: int, value: float) -> Iterator[None]:
    """One entry of one gradient is ``value`` on ``rank`` alone."""

    def spoil(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.view(-1)[1] = value
        return grad

    param = dict(engine.module.named_parameters())[name]
    hook = param.register_hook(spoil) if torch.distributed.get_rank() == rank else None
    yield
    if hook is not None:
        hook.remove()


def bad_gradient(situation: str, projection: str, value: float, bad_step: int) -> Outcome:
    """A NaN or Inf in one gradient of one rank at ``bad_step``, then steps with another refresh among them."""
    ranks, (stage, more) = torch.distributed.get_world_size(), SITUATIONS[situation]
    options = {**cases.SMOOTH, **cases.PROJECTIONS[projection]}
    with cpu_does_fp16(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = cases.start(cases.config_of(options, {"stage": stage}, ranks, **more))
        cases.train(engine, range(bad_step))
        before = cases.full_weights(engine)
        with poisoned(engine, VICTIM, ranks - 1, value):
            cases.train(engine, [bad_step])
        after = cases.full_weights(engine)
        counts = tuple(sorted(counters(engine).items()))
        cases.train(engine, range(bad_step + 1, bad_step + 1 + cases.GAP))
        end = cases.full_weights(engine)
    skipped = int(engine.skipped_steps)
    engine.destroy()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    learns = all(not torch.equal(after[name], end[name]) for name in end)
    finite = all(bool(torch.isfinite(value).all()) for value in end.values())
    return Outcome(skipped, VICTIM in moved, bool(moved - {VICTIM}), counts, finite, cases.digest(end), learns)


def counters(engine: Any) -> dict[str, int]:
    """How often each matrix and parameter was updated, by this rank's count; parts that are not here are left out."""
    found = {}
    for number, store in enumerate(engine.basic_optimizer.state.values()):
        for key, value in store.items():
            name, _, counter = key.rpartition("/")
            if counter == "updates" or (counter == "step" and f"{name}/updates".lstrip("/") not in store):
                found[name or f"tensor {number}"] = int(value)
    return found


def after_building(setting: str) -> tuple[list[str], set[int], set[int]]:
    """Parameters that the engine changed when it was built, all counts then, and all counts after one step."""
    chosen = cases.SETTINGS[setting]
    options = {**cases.SIGNS, "weight_decay": 0.5}
    engine = cases.start(cases.config_of(options, chosen.zero, torch.distributed.get_world_size(), **chosen.more))
    found, want = cases.full_weights(engine), dict(cases.small_llama().to(chosen.half).named_parameters())
    moved = [name for name in want if not torch.equal(found[name], want[name].detach().float())]
    at_first = set(counters(engine).values())
    cases.train(engine, [0])
    after = set(counters(engine).values())
    engine.destroy()
    return moved, at_first, after


def overflowing_scale(stage: int) -> tuple[int, tuple[int, ...], str, bool]:
    """fp16 whose loss scale is far too large at first: (steps skipped, all counts, digest, the first moved nothing)."""
    ranks = torch.distributed.get_world_size()
    fp16 = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 24, "hysteresis": 1}}
    with cpu_does_fp16():
        engine = cases.start(cases.config_of({**cases.SMOOTH}, {"stage": stage}, ranks, **fp16))
        first = cases.full_weights(engine)
        cases.train(engine, [0])
        untouched = all(torch.equal(first[name], value) for name, value in cases.full_weights(engine).items())
        cases.train(engine, range(1, 16))
    found = cases.full_weights(engine)
    result = (int(engine.skipped_steps), tuple(sorted(set(counters(engine).values()))), cases.digest(found), untouched)
    engine.destroy()
    return result


def fp16_at_stage0() -> str:
    ranks = torch.distributed.get_world_size()
    with cpu_does_fp16():
        engine = None
        try:
            engine = cases.start(cases.config_of({**cases.SMOOTH}, {"stage": 0}, ranks, **HALF))
            cases.train(engine, range(2))
        except ValueError as error:
            return str(error)
        finally:
            if engine is not None:
                engine.destroy()
    return ""


def remainders() -> list[str]:
    """What is said of rounding="remainder", stage by stage, while the engine is built or in its first step."""
    found = []
    for name in ("0, bf16", "2, bf16", "3, bf16"):
        chosen, options = cases.SETTINGS[name], {**cases.SMOOTH, "rounding": "remainder"}
        try:
            engine = cases.start(
                cases.config_of(options, chosen.zero, torch.distributed.get_world_size(), **chosen.more)
            )
            cases.train(engine, [0])
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def failing_svd(stage: int, attempts: int) -> tuple[str, list[str], str]:
    """The SVD of one matrix fails on its owner at ``attempts`` refreshes: (error, warnings, digest of the weights)."""
    from frugal_dist.projection import svd

    ranks = torch.distributed.get_world_size()
    options = {**copy.deepcopy(cases.SMOOTH), "projection": "svd"}
    engine = cases.start(cases.config_of(options, {"stage": stage}, ranks))
    real, error, left = svd.exact_svd, "", [attempts * 3]  # CPU and fp64 are tried as well

    def failing(grad: Tensor, side: str, size: int) -> Any:
        if tuple(grad.shape) == (101, 48) and torch.distributed.get_rank() == ranks - 1 and left[0]:
            left[0] -= 1
            raise torch.linalg.LinAlgError("made to fail")
        return real(grad, side, size)

    cases.train(engine, range(cases.GAP))
    svd.exact_svd = failing
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cases.train(engine, range(cases.GAP, cases.STEPS))
    except RuntimeError as raised:
        error = str(raised)
    finally:
        svd.exact_svd = real
    found = "" if error else cases.digest(cases.full_weights(engine))
    engine.destroy()
    return error, [str(one.message) for one in caught if "refresh failed" in str(one.message)], found
