"""Accelerate, which also drives the Trainer of transformers: what it is set to do with optimizers and their state.

Nothing here imports Accelerate: what is not loaded is not used.
"""

from __future__ import annotations

import re
import sys
from typing import Any

OWN_FILE = re.compile(r"optimizer(_\d+)?\.(pt|bin)|model(_\d+|-\d+-of-\d+)?\.safetensors")
"""What rank 0 alone writes into its checkpoints, and the Trainer's."""


def drives_deepspeed() -> bool:
    """Whether Accelerate hands models to DeepSpeed."""
    return _kind() == "DEEPSPEED"


def keeps_rank_zero_only() -> bool:
    """Whether its checkpoints, and so the Trainer's, keep no other rank's ``state_dict`` than rank 0's.

    So it is with replicas (DDP), and with FSDP under FULL_STATE_DICT, which gathers DTensors and nothing else.
    """
    kind, state = _kind(), _state()
    if kind == "FSDP":
        return str(getattr(state.fsdp_plugin.state_dict_type, "name", "")) == "FULL_STATE_DICT"
    return kind.startswith("MULTI_")


def refuse_replacement() -> None:
    """ValueError if Accelerate, under DeepSpeed's offload, would put DeepSpeedCPUAdam in the place of an optimizer.

    It says nothing about that and calls nothing of the old optimizer afterwards. All ranks have the same config.
    """
    plugin = _state().deepspeed_plugin if drives_deepspeed() else None
    config: dict[str, Any] = {} if plugin is None else plugin.deepspeed_config
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    forced = config.get("zero_force_ds_cpu_optimizer", True) and "optimizer" not in config
    if offload.get("device", "none") != "none" and forced:
        raise ValueError(
            f'With "offload_optimizer": {{"device": "{offload["device"]}"}} Accelerate replaces optimizers by '
            'DeepSpeedCPUAdam in silence; Frugal would never run. Put "zero_force_ds_cpu_optimizer": false into the '
            'DeepSpeed config, or let the config build the optimizer ("optimizer": {"type": "Frugal", ...}) and pass '
            "accelerate.utils.DummyOptim(parameters), or nothing to the Trainer."
        )


def scales_losses() -> bool:
    """Whether it scales losses, as fp16 needs it: gradients have their true size only shortly before the step."""
    return str(getattr(_state(), "mixed_precision", "")) == "fp16"


def in_use() -> bool:
    """Whether Accelerate, or the Trainer, runs this process."""
    return _state() is not None


def _state() -> Any:
    """Accelerate's state of this process; None while it has none."""
    module = sys.modules.get("accelerate.state")
    return module.AcceleratorState() if module is not None and module.is_initialized() else None


def _kind() -> str:
    """How Accelerate distributes: "NO", "MULTI_GPU", "MULTI_CPU", ..., "FSDP", "DEEPSPEED"; "" if it is not in use."""
    state = _state()
    return "" if state is None else str(state.distributed_type.value)
