"""Recipes of fine-tuning: a pretrained encoder, texts with labels, an optimizer.

Read by ``training/recipe``, as those of pre-training are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from frugal_dist.config import check_choice
from frugal_dist.presets import BEHIND, PRESETS, WITHOUT_RANK, TuningName
from frugal_dist.projection.registry import PROJECTIONS
from frugal_dist.training.finetune.glue import METRICS, TASKS
from frugal_dist.training.optimizers import AnyOptimizer, Optimizer, check_optimizer
from frugal_dist.training.recipe import Recipe, Run, Schedule, check_run
from frugal_dist.training.recipe.declared import AnyModel

_WIDE = 1 << 20
"""A hidden size for any rank."""


@dataclass(frozen=True, kw_only=True)
class EncoderModel(AnyModel):
    """The model.

    Args:
        path: folder or hub name, for AutoModelForSequenceClassification and AutoTokenizer; "package:NAME/FOLDER" is a
            folder inside an installed Python package.
        dropout: of the whole model; null leaves the model's own.
        freeze: name patterns of parameters that are not trained.
    """

    path: str = ""
    dropout: float | None = None
    freeze: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """Texts and labels: a GLUE task, or files.

    Args:
        task: cola, sst2, mrpc, stsb, qqp, mnli, qnli or rte; null where train and validation are files.
        source: where the tasks are: a hub name, or a folder laid out like it.
        train: CSV, TSV or JSONL file with the columns below.
        validation: such a file.
        validation_split: of a task, such as validation_mismatched of mnli; null takes its usual one.
        text: column with the text.
        text_pair: column with a second text; null if there is one text only.
        label: column with the label: whole numbers or words, numbers for a regression.
        regression: labels of the files are numbers to be predicted.
        metrics: accuracy, f1, matthews, pearson, spearman; null takes the task's, for files accuracy, for regressions
            pearson and spearman. Their mean is the score by which the best model is chosen.
    """

    task: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"] | None = None
    source: str = "nyu-mll/glue"
    train: str | None = None
    validation: str | None = None
    validation_split: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    regression: bool = False
    metrics: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Tuning(AnyOptimizer):
    """The optimizer.

    Args:
        name: frugal or another of ``PRESETS``, or lora: AdamW on adapters.
        rank: the density as a rank: it becomes rank / hidden size. Null: options.density counts, as it does for badam
            and blockwise, where the density is a share of the matrices.
        stateful: name patterns of matrices to which the density applies; the other matrices get density 0. Null: all.
        options: any other hyperparameter of FrugalConfig, such as density, update_gap, projection.
    """

    name: TuningName = "frugal"
    lr: float = 1e-4
    rank: int | None = None
    stateful: list[str] | None = None

    def plain(self, hidden: int) -> Optimizer:
        """The same for a model of this hidden size, as pre-training has it."""
        name, options = BEHIND.get(self.name, self.name), dict(self.options)
        chosen = {**options, **PRESETS[name]}.get("projection")
        blocks = chosen in PROJECTIONS and PROJECTIONS[str(chosen)].family == "blocks"
        if self.rank is not None and self.name not in WITHOUT_RANK and not blocks:
            options["density"] = density_of(self.rank, hidden)
        shared: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(AnyOptimizer)}
        return Optimizer(**shared | {"name": name, "options": options})


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapters of ``optimizer.name: lora``, see peft's LoraConfig.

    Args:
        rank: of every adapter.
        alpha: its scale is alpha / rank.
        dropout: before the adapter.
        targets: names of the Linear layers that get one.
    """

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["query", "value"])


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Run):
    """A fine-tuning run.

    Args:
        epochs: passes over the training examples.
        steps: optimizer steps; 0: as many as the epochs need.
        batch: examples per step over all ranks.
        micro_batch: examples that a rank computes at once; null takes all of its share.
        length: tokens to which an example is cut; batches are padded to their longest.
        evaluate_every: steps between two evaluations of the whole validation set; 0: once an epoch.
        seed: of the head, the dropout and the data order.
    """

    SHIPPED = "recipes/finetune"

    model: EncoderModel = field(default_factory=EncoderModel)
    data: LabelledData = field(default_factory=LabelledData)
    optimizer: Tuning = field(default_factory=Tuning)
    lora: Lora = field(default_factory=Lora)
    schedule: Schedule = field(default_factory=lambda: Schedule(name="linear", warmup=0.06, floor=0.0))
    folder: str = "runs/finetune"
    epochs: float = 3.0
    steps: int = 0
    batch: int = 32
    length: int = 128
    clip: float = 1.0
    evaluate_every: int = 0

    def as_run(self, examples: int, hidden: int) -> Recipe:
        """What the engines and the loop need to know, for so many training examples and this hidden size."""
        shared: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(Run)}
        return replace(
            Recipe(**shared | {"optimizer": self.optimizer.plain(hidden)}),
            steps=self.steps or max(1, round(self.epochs * examples / self.batch)),
            evaluate_every=self.evaluate_every or max(1, round(examples / self.batch)),
        )


def density_of(rank: int, hidden: int) -> float:
    """The density by which a matrix of this width has so many columns with state, as the paper's fine-tuning has it."""
    density = rank / hidden
    return density if int(density * hidden) == rank else (rank + 1e-6) / hidden


def check_finetune(recipe: FinetuneRecipe) -> None:
    """As ``check_run``, for a fine-tuning."""
    check_run(recipe)
    if recipe.tp > 1:
        raise ValueError(f"tp is {recipe.tp}; fine-tuning does not divide layers. Leave it out.")
    if not recipe.epochs > 0:
        raise ValueError(f"epochs is {recipe.epochs:g}; it must be above 0.")
    if not recipe.model.path:
        raise ValueError("model.path is not set; name a folder or hub name with the pretrained model.")
    _check_data(recipe.data)
    rank = recipe.optimizer.rank
    if rank is not None and rank < 0:
        raise ValueError(f"optimizer.rank is {rank}; it must not be negative.")
    if rank is not None and "density" in recipe.optimizer.options:
        raise ValueError("optimizer.rank and optimizer.options.density both say the density; set one of them.")
    check_optimizer(recipe.optimizer.plain(_WIDE))


def _check_data(data: LabelledData) -> None:
    if data.task is None and (data.train is None or data.validation is None):
        raise ValueError(f"data.task is not set: name one of {', '.join(TASKS)}, or data.train and data.validation.")
    if data.task is not None and (data.train or data.validation):
        raise ValueError(
            f"data.task is {data.task!r}, but data.train or data.validation names a file: set one or other."
        )
    if data.task is None and data.validation_split is not None:
        raise ValueError("data.validation_split is for data.task; name the validation file in data.validation.")
    for name in data.metrics or ():
        check_choice("data.metrics", name, METRICS)
    regression = data.regression if data.task is None else TASKS[data.task].regression
    for name in data.metrics or ():
        if METRICS[name].regression != regression:
            what = "numbers" if regression else "classes"
            raise ValueError(f"data.metrics names {name}, but the labels are {what}.")
