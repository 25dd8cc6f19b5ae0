"""What a model holds beside the optimizer's parameters: buffers, and parameters that nobody optimizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from frugal_dist import engines
from frugal_dist.checkpoint.parts import Chunk, part_chunks
from frugal_dist.names import clean_name
from frugal_dist.sharding.storage import Box, Part
from frugal_dist.work import Runtime

PREFIX = "model/"
"""Of the names of these tensors in a checkpoint."""

Leftover = tuple[str, tuple[int, ...], Part, Tensor]


def leftovers(runtime: Runtime, model_or_engine: Any) -> list[Leftover]:
    """(name, whole shape, this rank's part, its memory); no communication. Tied parameters count once."""
    model = module_of(model_or_engine)
    known = {original.name for original in runtime.originals}
    held = {id(runtime.storage.carrier(i)) for i in range(len(runtime.originals))}
    found: list[Leftover] = []
    for name, param in model.named_parameters():
        if clean_name(name) not in known and id(param) not in held:
            found.append((clean_name(name), *engines.stored_part(name, param)))
    saved = set(model.state_dict().keys())
    for name, buffer in model.named_buffers():
        if name in saved and buffer.layout is not None and buffer.numel():
            whole = Box(tuple((0, size) for size in buffer.shape))
            found.append((clean_name(name), tuple(buffer.shape), whole, buffer))
    return found


def leftover_chunks(found: list[Leftover]) -> Iterator[Chunk]:
    """The same as rectangles."""
    for name, shape, part, local in found:
        yield from part_chunks(PREFIX + name, shape, part, local.detach())


def module_of(model_or_engine: Any) -> nn.Module:
    """The model inside DDP's or DeepSpeed's wrapper."""
    inner = getattr(model_or_engine, "module", model_or_engine)
    if not isinstance(inner, nn.Module):
        raise ValueError(f"expected a model or an engine, found {type(model_or_engine).__name__}.")
    return inner
