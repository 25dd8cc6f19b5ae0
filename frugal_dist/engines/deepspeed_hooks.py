"""What is wrapped around DeepSpeed's engine for our optimizer, where DeepSpeed asks nothing of the optimizer itself.

Everything else that is known about DeepSpeed's inside stands in ``deepspeed`` and ``zero``. Another optimizer's engine
goes the ways it went before.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ANY_RANKS = "frugal_dist.checkpoint saves on any engine and number of ranks and loads on any other"
OTHER_OPTIMIZER = (
    "If another optimizer saved it (AdamW, say), or other parameter groups: load the weights alone, "
    "engine.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False); with the Trainer "
    "begin with the model of that checkpoint instead of resume_from_checkpoint (docs/deepspeed.md)"
)


def install(optimizer_class: type[Any]) -> None:
    """Wrap the engine's methods. DeepSpeed must be loaded; once per process."""
    module = sys.modules.get("deepspeed.runtime.engine")
    if module is None:
        return
    engine_class = module.DeepSpeedEngine
    for name, wrapper in {
        "load_checkpoint": _load_checkpoint,
        "_configure_zero_optimizer": _configure,
        "_configure_bf16_optimizer": _configure,
        "offload_states": _offload_states,
        "reload_states": _reload_states,
    }.items():
        setattr(engine_class, name, wrapper(getattr(engine_class, name), optimizer_class))


def _load_checkpoint(inner: Callable[..., Any], optimizer_class: type[Any]) -> Callable[..., Any]:
    """DeepSpeed loads ZeRO state of the same number of ranks, optimizer and groups only; its errors do not say so.

    It calls nothing of ours before it refuses, and at stage 3 a rank without a file of its own fails with a bare
    assertion.
    """
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    refusals = (ZeRORuntimeException, AssertionError, RuntimeError, ValueError)

    @functools.wraps(inner)
    def load_checkpoint(engine: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(engine, *args, **kwargs)
        except refusals as error:
            ours = isinstance(engine.basic_optimizer, optimizer_class) and engine.zero_optimization()
            told = str(error) or "The checkpoint has no file for this rank"
            if not ours or type(error) not in refusals or "loading state_dict" in told:  # the last is torch's own
                raise
            advice = f"If another number of ranks saved it: {ANY_RANKS}. {OTHER_OPTIMIZER}."
            raise type(error)(f"{told.rstrip('.')}. {advice}") from error

    return load_checkpoint


def _configure(inner: Callable[..., Any], optimizer_class: type[Any]) -> Callable[..., Any]:
    """ZeRO-1 and 2 stumble over a group without a trainable parameter, such as our regular ones beside adapters.

    DeepSpeed itself has removed the empty groups just before (deepspeedai/DeepSpeed, engine._configure_optimizer).
    """
    from deepspeed.runtime.utils import is_optimized_parameter

    @functools.wraps(inner)
    def configure(engine: Any, optimizer: Any) -> Any:
        if isinstance(optimizer, optimizer_class):
            groups = [group for group in optimizer.param_groups if any(map(is_optimized_parameter, group["params"]))]
            optimizer.param_groups[:] = groups or optimizer.param_groups
        return inner(engine, optimizer)

    return configure


# --- state that is moved away and back --------------------------------------------------------------------------------


def _offload_states(inner: Callable[..., Any], optimizer_class: type[Any]) -> Callable[..., Any]:
    """ZeRO-3 offloads its own FusedAdam's state and, with it, the masters; ours it refuses. So that part is ours."""
    signature = inspect.signature(inner)

    @functools.wraps(inner)
    def offload_states(engine: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(engine, *args, **kwargs)
        call.apply_defaults()
        asked = call.arguments
        if not _is_ours_on_zero3(engine, optimizer_class) or asked["device"].value != "cpu":
            return inner(engine, *args, **kwargs)
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as Kinds

        wanted = set(engine._refine_include_states(asked["include"]))
        ours = {Kinds.hp_params, Kinds.optim_states} & wanted
        result = inner(engine, list(wanted - ours), asked["device"], asked["pin_memory"], asked["non_blocking"])
        away = functools.partial(to_host, pin=asked["pin_memory"], non_blocking=asked["non_blocking"])
        zero, anew = engine.optimizer, ours - engine.optimizer.offloaded_states
        if Kinds.hp_params in anew:
            for flat in zero.fp32_partitioned_groups_flat:
                flat.data = away(flat.data)
        if Kinds.optim_states in anew:
            move_state(engine.basic_optimizer, lambda value, param: away(value))
        zero.offloaded_states |= anew  # its reload_states brings the masters back
        return result

    return offload_states


def _reload_states(inner: Callable[..., Any], optimizer_class: type[Any]) -> Callable[..., Any]:
    """Ours comes back to where its parameters are, counts stay on the CPU."""

    @functools.wraps(inner)
    def reload_states(engine: Any, *args: Any, **kwargs: Any) -> Any:
        result = inner(engine, *args, **kwargs)
        if _is_ours_on_zero3(engine, optimizer_class):
            move_state(engine.basic_optimizer, lambda value, param: value.to(param.device))
        return result

    return reload_states


def _is_ours_on_zero3(engine: Any, optimizer_class: type[Any]) -> bool:
    return isinstance(engine.basic_optimizer, optimizer_class) and engine.zero_optimization_partition_weights()


def move_state(optimizer: Any, move: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace every moment and basis by ``move(it, the parameter it belongs to)``."""
    for param, store in optimizer.state.items():
        for key, value in store.items():
            if value.is_floating_point():  # the counts stay on the CPU
                store[key] = move(value, param)


def to_host(tensor: Tensor, pin: bool, non_blocking: bool) -> Tensor:
    """A copy in host memory, pinned or not; the tensor itself if it is there already."""
    if tensor.is_cpu:
        return tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=pin)
    return host.copy_(tensor, non_blocking=non_blocking)
