"""Jobs with Accelerate: a loop of one's own, a finished optimizer given to ``prepare``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import deepspeed_cases as cases
import hf_cases
import torch
from deepspeed_cases import Weights
from hf_cases import BATCH, MIDDLE, OPTIONS, STEPS
from torch import nn

OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
FREE = {"zero_force_ds_cpu_optimizer": False}


def _deepspeed(zero: dict[str, Any], **more: Any) -> dict[str, Any]:
    from accelerate.utils import DeepSpeedPlugin

    ranks = torch.distributed.get_world_size()
    config = cases.config_of({}, {**zero, "stage3_param_persistence_threshold": 0}, ranks, **more)
    config |= {"train_micro_batch_size_per_gpu": BATCH // ranks, "gradient_clipping": 1.0}
    if "optimizer" not in more:
        del config["optimizer"]
    return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)}


def _json(zero: dict[str, Any]) -> dict[str, Any]:
    """A JSON optimizer; DummyOptim brings lr and weight decay."""
    params = {**OPTIONS, "projection": "svd", "lr": "auto", "weight_decay": "auto"}
    return _deepspeed(zero, optimizer={"type": "Frugal", "params": params})


def _fsdp2(**more: Any) -> dict[str, Any]:
    from accelerate.state import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    PartialState(cpu=True)
    hf_cases.allow_fsdp()
    wrap = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": [hf_cases.BLOCKS]}
    return {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2, **wrap, **more)}


ENGINES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"cpu": True},
    "FSDP2": _fsdp2,
    "FSDP2, FULL_STATE_DICT": lambda: _fsdp2(state_dict_type="FULL_STATE_DICT"),
    "ZeRO-2": lambda: _deepspeed({"stage": 2}),
    "ZeRO-3": lambda: _deepspeed({"stage": 3}),
    "ZeRO-2, JSON": lambda: _json({"stage": 2}),
    "ZeRO-2, offload": lambda: _deepspeed(OFFLOAD, **FREE),
    "ZeRO-2, offload, forced": lambda: _deepspeed(OFFLOAD),
}


def accelerator_of(engine: str) -> Any:
    from accelerate import Accelerator

    hf_cases.reset()
    return Accelerator(**ENGINES[engine]())


def optimizer_for(model: nn.Module, **options: Any) -> Any:
    from frugal_dist import Frugal, split_parameters

    return Frugal(split_parameters(model), **{**OPTIONS, "projection": "svd", **options})


def prepared(engine: str, **options: Any) -> tuple[Any, nn.Module, Any]:
    from accelerate.utils import DummyOptim

    import frugal_dist  # noqa: F401

    accelerator, model = accelerator_of(engine), cases.small_llama()
    if engine.endswith("JSON"):
        optimizer = DummyOptim(list(model.parameters()), lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])
    else:
        optimizer = optimizer_for(model, **options)
    return accelerator, *accelerator.prepare(model, optimizer)


def train(accelerator: Any, model: nn.Module, optimizer: Any, steps: Iterable[int]) -> list[float]:
    """The losses of all ranks together."""
    shares, losses = hf_cases.steps_of(hf_cases.rows().chunk(STEPS)), []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = hf_cases.rate(step)
        loss = cases.loss_of(model, shares[step])
        losses.append(_mean(loss))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)  # DeepSpeed clips by itself
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _mean(loss: torch.Tensor) -> float:
    """Over the ranks."""
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return float(total) / torch.distributed.get_world_size()


def weights_of(model: Any) -> Weights:
    return cases.full_weights(model) if hasattr(model, "module") and hasattr(model, "zero_optimization") else (
        hf_cases.whole(model)
    )  # fmt: skip


def train_and_resume(folder: Path, engine: str) -> dict[str, Any]:
    """Train; then ``load_state`` in the middle, into spoiled weights, and go on: do both end alike?"""
    accelerator, model, optimizer = prepared(engine)
    train(accelerator, model, optimizer, range(MIDDLE))
    accelerator.save_state(str(folder))
    train(accelerator, model, optimizer, range(MIDDLE, STEPS))
    found, base = weights_of(model), hf_cases.innermost(optimizer)
    accelerator, model, optimizer = prepared(engine)
    if not hasattr(model, "zero_optimization"):
        hf_cases.spoil(model)
    accelerator.load_state(str(folder))
    train(accelerator, model, optimizer, range(MIDDLE, STEPS))
    resumed = weights_of(model)
    hf_cases.reset()
    return {
        "optimizer": type(base).__name__,
        "apart": hf_cases.apart(found),
        "differing": hf_cases.differing(resumed, found),
        "moments": sum(v.numel() for store in base.state.values() for k, v in store.items() if "exp_avg" in k),
    }


def save_in_the_middle(folder: Path, projection: str) -> None:
    """Saved under way; the weights at the end are written down by rank 0."""
    accelerator, model, optimizer = prepared("FSDP2", projection=projection)
    train(accelerator, model, optimizer, range(MIDDLE))
    accelerator.save_state(str(folder))
    train(accelerator, model, optimizer, range(MIDDLE, STEPS))
    found = weights_of(model)
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "end.pt")
    hf_cases.reset()


def resume_elsewhere(folder: Path, projection: str) -> float:
    """On another number of ranks than saved; the largest difference at the end."""
    accelerator, model, optimizer = prepared("FSDP2", projection=projection)
    hf_cases.spoil(model)
    accelerator.load_state(str(folder))
    train(accelerator, model, optimizer, range(MIDDLE, STEPS))
    found, want = weights_of(model), torch.load(folder / "end.pt")
    hf_cases.reset()
    return max(float((found[name] - want[name]).abs().max()) for name in want)


Legs = dict[str, tuple[str, str, str]]
"""By a name: the engine that saves, the one that loads, the projection."""


def _portable(engine: str, projection: str) -> tuple[Any, nn.Module, Any]:
    from frugal_dist.integrations.accelerate import portable_checkpoints

    accelerator, model, optimizer = prepared(engine, projection=projection)
    portable_checkpoints(accelerator, model, optimizer)
    return accelerator, model, optimizer


def save_portably(folder: Path, legs: Legs) -> dict[str, list[float]]:
    """Train each leg to the end and save in the middle; the last losses. Rank 0 writes down the weights at the end."""
    found = {}
    for name, (engine, _, projection) in legs.items():
        accelerator, model, optimizer = _portable(engine, projection)
        train(accelerator, model, optimizer, range(MIDDLE))
        accelerator.save_state(str(folder / name))
        found[name] = train(accelerator, model, optimizer, range(MIDDLE, STEPS))
        weights = weights_of(model)
        if torch.distributed.get_rank() == 0:
            torch.save(weights, folder / name / "end.pt")
    hf_cases.reset()
    return found


def resume_portably(folder: Path, legs: Legs) -> dict[str, tuple[list[float], float]]:
    """Go on from the middle: the last losses, and how far the weights end apart."""
    found = {}
    for name, (_, engine, projection) in legs.items():
        accelerator, model, optimizer = _portable(engine, projection)
        if not hasattr(model, "zero_optimization"):
            hf_cases.spoil(model)
        accelerator.load_state(str(folder / name))
        losses = train(accelerator, model, optimizer, range(MIDDLE, STEPS))
        weights, want = weights_of(model), torch.load(folder / name / "end.pt")
        found[name] = losses, max(float((weights[key] - want[key]).abs().max()) for key in want)
    hf_cases.reset()
    return found


def saved_again_without(folder: Path) -> str:
    """With the portable form, then to the same folder without; another stage is to load it."""
    accelerator, model, optimizer = _portable("ZeRO-2", "columns")
    train(accelerator, model, optimizer, range(1))
    accelerator.save_state(str(folder))
    train(accelerator, model, optimizer, range(1, 2))
    type(accelerator).save_state(accelerator, str(folder))
    accelerator, model, optimizer = _portable("ZeRO-3", "columns")
    return hf_cases.message_of(lambda: accelerator.load_state(str(folder)))


# --- what is refused --------------------------------------------------------------------------------------------------


def replaced(built_first: bool) -> str:
    """Accelerate would put DeepSpeedCPUAdam in its place, whether Frugal or the Accelerator is there first.

    Should it get that far, the test fails at once: compiling that optimizer takes minutes.
    """
    import deepspeed.ops.adam

    real, model = deepspeed.ops.adam.DeepSpeedCPUAdam, cases.small_llama()

    def replacement(*given: Any, **options: Any) -> None:
        raise AssertionError("Frugal was replaced")

    def job() -> object:
        early = optimizer_for(model) if built_first else None
        accelerator = accelerator_of("ZeRO-2, offload, forced")
        return accelerator.prepare(model, early or optimizer_for(model))

    deepspeed.ops.adam.DeepSpeedCPUAdam = replacement
    try:
        return hf_cases.message_of(job)
    finally:
        deepspeed.ops.adam.DeepSpeedCPUAdam = real


def replaced_by_deepspeed() -> str:
    """DeepSpeed alone refuses it itself."""
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    config = cases.config_of({}, OFFLOAD, torch.distributed.get_world_size())
    del config["optimizer"]
    model = cases.small_llama()
    return hf_cases.message_of(
        lambda: cases.start(config, model, optimizer=optimizer_for(model)), (ZeRORuntimeException,)
    )


def two_optimizers() -> str:
    model = cases.small_llama()
    return hf_cases.message_of(lambda: accelerator_of("ZeRO-2, JSON").prepare(model, optimizer_for(model)))


def partly_saved(engine: str, options: dict[str, Any]) -> str:
    """``save_state`` would keep rank 0's part only: the first step refuses."""
    accelerator, model, optimizer = prepared(engine, **options)
    return hf_cases.message_of(lambda: train(accelerator, model, optimizer, range(1)))
