"""The weights of a checkpoint on one process: no ranks, no engine, no optimizer. For export, evaluation, looking."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from frugal_dist.checkpoint.errors import MismatchError
from frugal_dist.checkpoint.folder import LATEST, latest_step, step_folder
from frugal_dist.checkpoint.parts import BUFFER, WEIGHT
from frugal_dist.checkpoint.reader import Reader


class SavedWeights:
    """``weights["model.norm.weight"]``: one tensor of a checkpoint at a time, put together from the ranks' files.

    Args:
        path: a checkpoint, or a folder of them, of which the latest is taken.
        verify: compare the checksums of all files first, which reads everything once.

    Attributes:
        folder: the checkpoint that was taken.
        shapes: of all parameters, by name.
        buffer_shapes: of all persistent buffers, by name.
        model_config: the configuration of a Hugging Face model, None if the model had none.

    Raises:
        CheckpointError: (a ValueError) if the checkpoint is missing or damaged; MismatchError for a name that it does
            not have.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = True) -> None:
        self._reader = Reader(_one_checkpoint(Path(path)))
        self._reader.check_files(contents=verify)
        index = self._reader.index
        self.folder = self._reader.folder
        self.shapes = {name: tuple(shape) for name, shape in index.parameters.items()}
        self.buffer_shapes = {name: tuple(shape) for name, shape in index.buffers.items()}
        self.model_config: dict[str, Any] | None = index.model_config

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise MismatchError(f"{self.folder} has no parameter {name!r}.")
        return self._reader.whole(WEIGHT + name).view(self.shapes[name])

    def buffer(self, name: str) -> Tensor:
        """One persistent buffer of the model, whole, on the CPU, in the dtype in which it was saved.

        Args:
            name: a key of ``buffer_shapes``.

        Raises:
            MismatchError: (a ValueError) for another.
        """
        if name not in self.buffer_shapes:
            raise MismatchError(f"{self.folder} has no buffer {name!r}.")
        return self._reader.whole(BUFFER + name).view(self.buffer_shapes[name])


def _one_checkpoint(path: Path) -> Path:
    if not (path / LATEST).exists():
        return path
    step = latest_step(path)
    return path if step is None else step_folder(path, step)
