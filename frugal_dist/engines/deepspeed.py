"""DeepSpeed's engine: what its config asks for, its names for parameters, its counts.

Nothing here imports DeepSpeed: what is not loaded is not used.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from frugal_dist.engines.hooks import ANY_RANKS, deepspeed_engine_in_construction, make_known_to_deepspeed

COUNTS = ("global_steps", "global_samples", "skipped_steps")
OWN_FILE = re.compile(r"((bf16_)?zero_pp_rank_0_)?mp_rank_00_(model|optim)_states\.pt")
"""What rank 0 writes into a checkpoint of DeepSpeed's own."""
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape in the user's model; under zero.Init the tensor itself is empty."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def names_of(tensors: Sequence[Tensor]) -> list[str | None]:
    """The names by which DeepSpeed knows a model's parameters while it builds the optimizer; None where it does not."""
    engine = deepspeed_engine_in_construction()
    if engine is not None:
        return [engine.param_names.get(tensor) for tensor in tensors]
    debug = sys.modules.get("deepspeed.utils.debug")  # forgets everything whenever any engine is collected
    known: Any = () if debug is None else debug.param_names
    return [known[tensor] if tensor in known else None for tensor in tensors]  # noqa: SIM401 (it has no .get)


def announce(optimizer_class: type[Any]) -> None:
    """Tell DeepSpeed, if it is loaded, that ZeRO may wrap this optimizer: no zero_allow_untested_optimizer needed.

    Called when an optimizer is built, since DeepSpeed may be imported after frugal_dist. If an engine is building it
    (from JSON, or calling a client's function), ValueError for what Frugal does not support: the features fail in
    stranger ways soon after.
    """
    make_known_to_deepspeed(optimizer_class)
    engine = deepspeed_engine_in_construction()
    if engine is not None:
        check_supported(engine)


def json_options() -> dict[str, Any] | None:
    """The "params" of the JSON from which DeepSpeed is building an optimizer right now; None if it is not."""
    engine = deepspeed_engine_in_construction()
    if engine is None or engine.client_optimizer is not None or not engine.optimizer_name():
        return None
    options: dict[str, Any] = engine.optimizer_params() or {}
    return options


PLAIN_OFFLOAD = 'use "offload_optimizer": {"device": "cpu"} alone'
PLAIN_ZERO3 = "use plain ZeRO-3"
FP32_MASTERS = "remove it: Frugal needs fp32 master weights"


def check_supported(engine: Any) -> None:
    """ValueError, with what to use instead, if the engine's config asks for something Frugal does not support."""
    for feature, (wanted, instead) in _unsupported(engine).items():
        if wanted:
            raise ValueError(f"Frugal does not support DeepSpeed's {feature}: {instead}.")


def _unsupported(engine: Any) -> dict[str, tuple[bool, str]]:
    config = engine._config
    zero, bf16, fp16 = config.zero_config, config.bfloat16_config, config.float16_config
    optimizer, params = zero.offload_optimizer, zero.offload_param
    offloads = optimizer is not None and optimizer.device != "none"
    experts = config.expert_parallel_config
    return {
        "SuperOffload": (offloads and optimizer.super_offload, PLAIN_OFFLOAD),
        "ZenFlow": (zero.zenflow is not None, PLAIN_OFFLOAD),
        "partial offload (offload_optimizer.ratio below 1)": (offloads and optimizer.ratio != 1.0, PLAIN_OFFLOAD),
        "NVMe offload of the optimizer": (offloads and optimizer.device == "nvme", PLAIN_OFFLOAD),
        "NVMe offload of parameters": (
            params is not None and params.device == "nvme",
            'use "offload_param": {"device": "cpu"}',
        ),
        "hpZ (zero_hpz_partition_size above 1)": (zero.zero_hpz_partition_size > 1, PLAIN_ZERO3),
        "tensor parallelism (AutoTP, mpu)": (_tensor_parallel(engine), "use ZeRO-3 to fit larger models"),
        "pipeline parallelism": (bool(engine.__dict__.get("pipeline_parallelism")), "use ZeRO-3 to fit larger models"),
        "expert parallelism (expert_parallel.autoep_size above 1)": (
            experts.enabled and experts.autoep_size > 1,
            "use autoep_size 1 with ZeRO-3",
        ),
        "expert parallelism (deepspeed.moe with ep_size above 1)": (
            _divides_experts(engine),
            "its ranks have different experts under the same names; use ep_size 1",
        ),
        "DeepCompile": (config.compile_config.deepcompile, 'remove "deepcompile"; torch.compile of the model works'),
        "bf16_master_weights_and_grads": (bf16.bf16_master_weights_and_grads, FP32_MASTERS),
        "bf16_optimizer_states": (bf16.bf16_optimizer_states, FP32_MASTERS),
        "fp16_master_weights_and_grads": (fp16.fp16_master_weights_and_grads, FP32_MASTERS),
        "round_robin_gradients": (
            zero.round_robin_gradients,
            "set it to false; DeepSpeed's own record of where parameters lie is wrong with it",
        ),
        "torch_autocast in float16": (
            engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16,
            'use bfloat16, or "fp16": its loss scale is saved, and all ranks skip the same steps',
        ),
        "zero_quantized_nontrainable_weights": (
            zero.zero_quantized_nontrainable_weights,
            "remove it; checkpoints would keep frozen weights without their scales",
        ),
        "elastic checkpoints (elastic_checkpoint)": (zero.elastic_checkpoint, CHECKPOINT),
        "universal checkpoints (load_universal)": (config.load_universal_checkpoint, CHECKPOINT),
    }


CHECKPOINT = f"they keep nothing but AdamW's moments. {ANY_RANKS}"


def _divides_experts(engine: Any) -> bool:
    """By what deepspeed.moe leaves on the parameters of experts."""
    experts = [param for param in engine.module.parameters() if not getattr(param, "allreduce", True)]
    return any(getattr(param, "group_name", "ep_size_1") != "ep_size_1" for param in experts)


def _tensor_parallel(engine: Any) -> bool:
    mpu = engine.__dict__.get("mpu")
    by_hand = mpu is not None and hasattr(mpu, "get_model_parallel_world_size")
    return bool(engine.autotp_size() > 1 or (by_hand and mpu.get_model_parallel_world_size() > 1))


# --- counts, and weights that were replaced -----------------------------------------------------------------------


def counts_of(engine: Any) -> dict[str, Any]:
    """Steps, schedule and loss scale of a DeepSpeed engine; nothing for a plain model."""
    if not is_engine(engine):
        return {}
    accumulated = _accumulated(engine)
    if accumulated:
        raise ValueError(
            f"{accumulated} of {engine.gradient_accumulation_steps()} micro-batches of the running step are done; "
            "their gradients cannot be saved. Save after the last one."
        )
    counts = {name: int(getattr(engine, name)) for name in COUNTS}
    schedule = None if engine.lr_scheduler is None else engine.lr_scheduler.state_dict()
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    scale = {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)}
    return {"counts": counts, "schedule": schedule, "scale": scale}


def _accumulated(engine: Any) -> int:
    """Backward passes since the last step; 0 where the user marks the boundary, and only the user knows."""
    if not engine.managed_gradient_accumulation():  # every step() is one
        return int(engine._unmanaged_backward_count)
    if engine._is_gradient_accumulation_boundary is not None:
        return 0
    return int(engine.micro_steps % engine.gradient_accumulation_steps())


def after_loading(engine: Any, saved: dict[str, Any]) -> None:
    """Copy new fp32 masters into the model's own weights; restore counts that another DeepSpeed engine saved."""
    if not is_engine(engine):
        return
    _update_low_precision(engine.optimizer)
    for name, value in saved.get("counts", {}).items():
        setattr(engine, name, value)
    if engine.lr_scheduler is not None and saved.get("schedule"):
        engine.lr_scheduler.load_state_dict(saved["schedule"])
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    if getattr(scaler, "dynamic", False):  # a static one is what the config says
        for name, value in saved.get("scale", {}).items():
            setattr(scaler, name, value)


def group_of(engine: Any) -> Any:
    """The process group over which a DeepSpeed engine spreads parameters and state; None for a plain model."""
    return engine.seq_data_parallel_group if is_engine(engine) else None


def layout_of(engine: Any) -> str:
    """The stage of a DeepSpeed engine, what keeps its masters, its precision; "" for a plain model."""
    if not is_engine(engine):
        return ""
    half = "fp16" if engine.fp16_enabled() else "bf16" if engine.bfloat16_enabled() else "fp32"
    return f"ZeRO-{engine.zero_optimization_stage():d} ({type(engine.optimizer).__name__}, {half})"


def is_engine(engine: Any) -> bool:
    """Whether it is DeepSpeed's."""
    return all(hasattr(engine, name) for name in COUNTS)


def _update_low_precision(wrapper: Any) -> None:
    if hasattr(wrapper, "update_lp_params"):  # ZeRO-1/2, BF16_Optimizer
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp16_partitioned_groups_flat"):  # ZeRO-3
        _update_zero3(wrapper)
    elif hasattr(wrapper, "fp32_groups"):  # stage 0 in bf16
        for masters, copies in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, copy in zip(masters, copies, strict=True):
                copy.data.copy_(master.data)


def _update_zero3(zero: Any) -> None:
    """What ZeRO-3 does itself after loading: flat masters into flat copies, those into the partitions.

    Parameters that an evaluation left whole would be used as they are.
    """
    zero.checkpoint_event_prologue()
    for number, master in enumerate(zero.fp32_partitioned_groups_flat):
        flat = zero.fp16_partitioned_groups_flat[number]
        flat.data.copy_(master.data)
        pieces = zero.unflatten(flat, zero.fp16_partitioned_groups[number])
        for partition, piece in zip(zero.fp16_partitioned_groups[number], pieces, strict=True):
            partition.data = piece.data
    zero.checkpoint_event_epilogue()
