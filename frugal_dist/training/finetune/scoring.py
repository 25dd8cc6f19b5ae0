"""The score of a classifier on the whole validation set, the same for every number of ranks; the best model is kept."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from frugal_dist.checkpoint import SavedWeights
from frugal_dist.training.distributed.ranks import agree
from frugal_dist.training.engines import Engine
from frugal_dist.training.engines.collectives import gathered
from frugal_dist.training.finetune.classification import Classifier, ExampleRows
from frugal_dist.training.finetune.glue import measure
from frugal_dist.training.folders import give_ordinary_permissions
from frugal_dist.training.validation import EvalResult

_TOGETHER = 32
BEST = "best"
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Scoring:
    """Metrics of all validation examples."""

    rows: ExampleRows
    classifier: Classifier
    metrics: tuple[str, ...]

    def evaluate(self, engine: Engine, stop: Callable[[], bool]) -> EvalResult | None:
        """Batches are the same for every number of ranks: of examples of similar length; batch i is for rank i mod
        world. Every rank calls the model equally often, as sharded weights require; what is beyond the end counts
        nothing.
        """
        order = np.argsort(self.rows.sizes, kind="stable")
        batches = [order[first : first + _TOGETHER] for first in range(0, len(order), _TOGETHER)]
        mine: list[tuple[int, Tensor, Tensor]] = []
        for turn in range(-(-len(batches) // engine.world)):
            if stop():
                return None
            number = turn * engine.world + engine.rank
            rows = torch.from_numpy(self.rows.take(batches[min(number, len(batches) - 1)]))
            logits = engine.outputs(self.classifier.logits, rows)
            if number < len(batches):
                mine.append((number, self.classifier.labels(rows), logits.cpu()))
        of_all = sorted((part for parts in gathered(mine) for part in parts), key=lambda part: part[0])
        return self._finding(torch.cat([part[1] for part in of_all]), torch.cat([part[2] for part in of_all]))

    def _finding(self, labels: Tensor, logits: Tensor) -> EvalResult:
        loss = float(self.classifier.losses_of(logits.double(), labels).mean())
        scores = measure(self.metrics, labels.numpy(), self.classifier.predictions(logits))
        text = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        return EvalResult(loss, {**scores, "score": mean(scores.values())}, f"validation {text}")


@dataclass
class Best:
    """Keeps the best model so far in ``folder/best``, as Hugging Face has it.

    ``build()``: a model like the one that is trained, to be filled. ``step``: of the kept model; ``lost``: how many
    better ones could not be saved. The newest evaluation is kept here too.
    """

    folder: Path
    engine: Engine
    build: Callable[[], nn.Module]
    tokenizer: Any
    on_error: str
    step: int = 0
    lost: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def evaluated(self, step: int, evaluation: EvalResult) -> None:
        """Hear of an evaluation. All ranks hear the same and write together."""
        self.last = evaluation.metrics
        if self.metrics and not evaluation.metrics["score"] > self.metrics["score"]:
            return
        # By way of a checkpoint, which every engine can write.
        saved = self.engine.save(self.folder / f".{BEST}", step, {}, keep_last=1, on_error=self.on_error)
        if saved and self._published({"step": step, **evaluation.metrics}):
            self.step, self.metrics = step, evaluation.metrics
        else:
            self.lost += 1

    def remember(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"best": {"step": self.step, "figures": self.metrics}}

    def recall(self, extra: dict[str, Any]) -> None:
        """Resume with what a checkpoint holds. A model that was kept after it will be kept again."""
        self.step, self.metrics = extra["best"]["step"], extra["best"]["figures"]

    def _published(self, record: dict[str, Any]) -> bool:
        """Whether the checkpoint is now in ``best``. If rank 0 fails to convert it, all ranks raise; with ``on_error``
        "warn" and a disk to blame, none does, and the model that was there stays.
        """
        trouble: Exception | None = None
        saved, partial = self.folder / f".{BEST}", self.folder / f".{BEST}.partial"
        if self.engine.rank == 0:
            try:
                self._convert(saved, partial, record)
            except Exception as error:  # the others must hear of it, whatever it is
                trouble = error
        if not any(gathered(self.on_error == "warn" and _is_of_the_disk(trouble))):
            agree(trouble)
            return True
        if trouble is not None:
            warnings.warn(f"The best model was not saved, training goes on: {trouble}", stacklevel=2)
            for unfinished in (partial, saved):  # they take the room of the next checkpoint
                shutil.rmtree(unfinished, ignore_errors=True)
        return False

    def _convert(self, saved: Path, partial: Path, record: dict[str, Any]) -> None:
        old, final = self.folder / f".{BEST}.old", self.folder / BEST
        shutil.rmtree(partial, ignore_errors=True)
        with torch.random.fork_rng(devices=[]):  # building a model draws numbers, on the CPU
            model: Any = self.build()
        fill(model, SavedWeights(saved, verify=False))
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        model.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        give_ordinary_permissions(partial)
        (partial / EVALUATION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(saved, ignore_errors=True)


def _is_of_the_disk(trouble: Exception | None) -> bool:
    """Full, read-only or gone; safetensors tells of it with an error of its own."""
    return isinstance(trouble, OSError | SafetensorError)


def fill(model: nn.Module, weights: SavedWeights) -> None:
    """Put saved weights into a model. ValueError that names what the checkpoint lacks."""
    tensors = {name: weights[name] for name in weights.shapes}
    missing = {name for name, _ in model.named_parameters()} - set(tensors)
    if missing:
        raise ValueError(f"{weights.folder} lacks {len(missing)} parameters of the model, such as {min(missing)}.")
    model.load_state_dict(tensors, strict=False)
