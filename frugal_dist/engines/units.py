"""Which gradients are complete together in a backward pass, and who cannot have a step taken inside of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from frugal_dist.engines import accelerate, hooks, zero
from frugal_dist.sharding.collectives import ranks_of

NAME = "frugal_dist.step_in_backward"
_ACCELERATE_FP16 = (
    f"{NAME}: with mixed_precision='fp16' Accelerate scales the loss, and divides gradients by the scale only after "
    "backward, when they have been stepped with. Use bf16."
)
_DEEPSPEED = (
    f"{NAME}: under DeepSpeed the engine owns the gradients, and frees them itself (ZeRO-2 and 3 partition them). "
    "Leave it out, or use FSDP2: torch.distributed.fsdp.fully_shard(model)."
)
_REPLICAS = (
    f"{NAME}: {{what}}. DDP keeps all gradients in its buckets and averages them after backward has produced them: "
    "nothing would be saved, and each rank would step with its own. Use FSDP2: "
    "torch.distributed.fsdp.fully_shard(block) for each block, then fully_shard(model)."
)
_NO_UNITS = (
    f"{NAME}: the parameters are DTensors, but {{kind}} has no unit of FSDP2, whose reduce-scatter tells when a "
    "gradient is complete on all ranks. Give it the model after fully_shard(block) for each block and "
    "fully_shard(model)."
)
_CLIPPED = (
    f"{NAME}: {{asked}} clips by the norm of all gradients, which are stepped with and gone before it is known. Set it "
    "to 0 (steps of signs and of AdamW do not grow with the gradient, and growth_limit limits each matrix of the rules "
    "of whole lines), or leave step_in_backward out."
)


def units_of(model: nn.Module, params: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Positions of parameters whose gradients come together: the members of a unit of FSDP2, after its reduce-scatter,
    in the same order on all ranks; else each parameter by itself.

    Beside FSDP2 only its own parameters: when the gradients of others are complete on all ranks is not known.
    """
    sharded = _units_of_fsdp2(model)
    if not sharded:
        return [(i,) for i in range(len(params))]
    places = {id(param): i for i, param in enumerate(params) if hasattr(param, "device_mesh")}
    units = []
    for module in reversed(sharded):  # the inner ones first: a parameter belongs to the innermost
        module.reshard()  # or an evaluation may have left whole parameters in their place
        members = [places.pop(id(param)) for param in module.parameters() if id(param) in places]
        if members:
            units.append(tuple(members))
    return units


def _units_of_fsdp2(model: nn.Module) -> list[Any]:
    kinds = hooks.loaded_classes("FSDPModule", "torch.distributed.fsdp")
    return [module for module in model.modules() if isinstance(module, kinds)]


def refuse_release(model: nn.Module, optimizer: Any, params: Sequence[Tensor], process_group: Any) -> None:
    """ValueError for who needs the gradients after backward. No collective: all ranks have the same engine."""
    if accelerate.drives_deepspeed() or zero.holds(model, optimizer, params):
        raise ValueError(_DEEPSPEED)
    if hooks.wrapped_in_ddp(model, params):
        raise ValueError(_REPLICAS.format(what="the model is wrapped in DistributedDataParallel"))
    if accelerate.scales_losses():
        raise ValueError(_ACCELERATE_FP16)
    sharded = any(hasattr(param, "device_mesh") for param in params)
    if not sharded and not ranks_of(process_group).alone:
        raise ValueError(_REPLICAS.format(what="every rank holds whole parameters, as under DDP"))
    if sharded and not _units_of_fsdp2(model):
        raise ValueError(_NO_UNITS.format(kind=type(model).__name__))
    asked = hooks.clipping_of_trainer()
    if asked:
        raise ValueError(_CLIPPED.format(asked=asked))
