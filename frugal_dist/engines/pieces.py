"""A divided tensor as torch.distributed.checkpoint takes it: saved in rectangles, loaded on any number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from frugal_dist.engines.hooks import dcp_is_asking

Rectangle = tuple[tuple[int, ...], Tensor]
"""Where it begins in the whole, and the memory that holds it on this rank."""


class Pieces(Tensor):
    """A rank's part of a tensor of ``shape``: some rectangles of it, which are views of ``local``.

    The three methods with underscores are those by which torch.distributed.checkpoint asks a DTensor for its one
    rectangle; here there may be several, or none.
    """

    local: Tensor
    rectangles: list[Rectangle]

    @staticmethod
    def __new__(cls: type[Pieces], shape: Sequence[int], local: Tensor, rectangles: Sequence[Rectangle]) -> Pieces:
        made: Pieces = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=local.dtype, device=local.device)
        made.local = local
        made.rectangles = [one for one in rectangles if one[1].numel()]
        return made

    def __init__(self, shape: Sequence[int], local: Tensor, rectangles: Sequence[Rectangle]) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        if func is torch.ops.aten.new_empty.default:  # dcp.async_save, which then copies the attributes one by one
            return cls(args[1], torch.empty(0, dtype=args[0].dtype, device=(kwargs or {}).get("device")), [])
        raise NotImplementedError(f"{func} on a rank's part of the optimizer's state, which is for saving and loading.")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Pieces({tuple(self.shape)}, {[begin for begin, _ in self.rectangles]})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Who pickles a rank's own file gets this rank's part, an ordinary tensor; dcp.async_save's process all."""
        if dcp_is_asking():
            return type(self), (tuple(self.shape), self.local, self.rectangles)
        return self.local.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.local, memo)

    def __create_write_items__(self, fqn: str, pieces: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties.create_from_tensor(self.local), size=self.size()
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [
            ChunkStorageMetadata(offsets=torch.Size(begin), sizes=torch.Size(view.shape))
            for begin, view in self.rectangles
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        begin = tuple(index.offset)
        return next(view for start, view in self.rectangles if start == begin)
