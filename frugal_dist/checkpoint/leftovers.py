"""What a model holds beside the optimizer's parameters: parameters that nobody optimizes, and buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frugal_dist import engines
from frugal_dist.checkpoint.errors import CheckpointError
from frugal_dist.checkpoint.parts import WEIGHT, Chunk, part_chunks
from frugal_dist.parameters.names import clean_name
from frugal_dist.sharding.shard import Box, LocalShard
from frugal_dist.step.runtime import Runtime

BUFFER = "buffer/"
"""Of the names of buffers in a checkpoint."""


@dataclass(frozen=True)
class Leftover:
    """A tensor of the model: its whole shape, which part of it is on this rank, and that part's memory."""

    key: str
    name: str
    shape: tuple[int, ...]
    part: LocalShard
    local: Tensor

    @property
    def chunks(self) -> Iterator[Chunk]:
        return part_chunks(self.key, self.shape, self.part, self.local.detach())


def leftovers(runtime: Runtime, model_or_engine: Any) -> list[Leftover]:
    """All of them, tied parameters once; no communication."""
    model = module_of(model_or_engine)
    known = {original.name for original in runtime.originals}
    saved = set(model.state_dict().keys())  # first: it makes FSDP2 give up whole parameters kept from a forward pass
    held = {id(runtime.storage.param(i)) for i in range(len(runtime.originals))}
    found = []
    for name, param in model.named_parameters():
        plain = clean_name(name)
        if plain not in known and id(param) not in held:
            found.append(Leftover(WEIGHT + plain, plain, *engines.stored_part(name, param)))
    for name, buffer in model.named_buffers():
        if name in saved and buffer.numel():
            _check_plain(name, buffer)
            plain, whole = clean_name(name), Box(tuple((0, size) for size in buffer.shape))
            found.append(Leftover(BUFFER + plain, plain, tuple(buffer.shape), whole, buffer))
    return found


def _check_plain(name: str, buffer: Tensor) -> None:
    """CheckpointError, naming the buffer, for what has no plain bytes."""
    what = "on the meta device, without values" if buffer.is_meta else f"sparse ({buffer.layout})"
    if buffer.is_meta or buffer.layout != torch.strided:
        raise CheckpointError(
            f"buffer {name} is {what}, and cannot be saved or loaded. Register it with persistent=False, or make it a "
            "plain tensor."
        )


def module_of(model_or_engine: Any) -> nn.Module:
    """The model inside DDP's or DeepSpeed's wrapper."""
    inner = getattr(model_or_engine, "module", model_or_engine)
    if not isinstance(inner, nn.Module):
        raise ValueError(f"expected a model or an engine, found {type(model_or_engine).__name__}.")
    return inner
