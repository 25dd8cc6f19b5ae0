"""FSDP2 beside tensor parallelism: which layers of a model are divided, and over which ranks."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from frugal_dist.planner.mesh import CUT_BY_COLUMNS, CUT_BY_ROWS


def two_axes(world: int, tp: int, device_type: str) -> DeviceMesh:
    """Neighbouring ranks divide layers; the others divide batches, and shard."""
    return init_device_mesh(device_type, (world // tp, tp), mesh_dim_names=("fsdp", "tp"))


def divide_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """The layers that transformers' and torchtitan's plans name, with their outputs or their inputs divided, in place.

    ValueError if the model has none of them, or one that does not divide.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    tp = mesh.size()
    plan: dict[str, ParallelStyle] = {}
    for name, layer in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(layer, nn.Linear) and last in (*CUT_BY_ROWS, *CUT_BY_COLUMNS):
            by_rows = last in CUT_BY_ROWS
            _check_divides(name, layer.out_features if by_rows else layer.in_features, tp)
            plan[name] = ColwiseParallel() if by_rows else RowwiseParallel()
    if not plan:
        raise ValueError(
            f"tp is {tp}, but {type(model).__name__} has no layers that it divides: {', '.join(CUT_BY_ROWS)}, "
            f"{', '.join(CUT_BY_COLUMNS)}. Use fsdp2 alone."
        )
    config = getattr(model, "config", None)
    _check_divides("num_key_value_heads", int(getattr(config, "num_key_value_heads", None) or tp), tp)
    parallelize_module(model, mesh, plan)


def _check_divides(name: str, size: int, tp: int) -> None:
    if size % tp:
        raise ValueError(f"tp is {tp}, which does not divide the {size} of {name}. Use another tp, or fsdp2 alone.")
