"""Recipes of fine-tuning: a pretrained encoder, texts with labels, an optimizer. Read as ``recipe.py`` reads others."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from frugal_dist.config import check_choice
from frugal_dist.presets import BEHIND, PRESETS, WITHOUT_RANK, TuningName
from frugal_dist.projection.registry import PROJECTIONS
from frugal_dist.training.finetune.glue import METRICS, TASKS
from frugal_dist.training.metrics.record import check_trackers
from frugal_dist.training.recipe import Number, Optimizer, Recipe, Saving, Schedule, check_saving, check_seed


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model.

    Args:
        path: folder or hub name, for AutoModelForSequenceClassification and AutoTokenizer; "package:NAME/FOLDER" is a
            folder inside an installed Python package.
        dropout: of the whole model; null leaves the model's own.
        freeze: name patterns of parameters that are not trained.
        attention: implementation in transformers: sdpa, eager or flash_attention_2.
        checkpointing: recompute activations in the backward pass, for memory.
        compile: torch.compile the model.
    """

    path: str = ""
    dropout: float | None = None
    freeze: list[str] = field(default_factory=list)
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class Data:
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
class Tuning:
    """The optimizer.

    Args:
        name: frugal, galore, badam, signsgd, adamw, or lora: AdamW on adapters.
        lr: learning rate.
        weight_decay: decoupled.
        project: name patterns of all parameters that are projected; null: all matrices but embeddings, heads, routers.
        skip: name patterns of parameters that are never projected.
        no_decay: name patterns of parameters without weight decay.
        rank: the density as a rank: it becomes rank / hidden size. Null: options.density counts, as it does for badam
            and blockwise, where the density is a share of the matrices.
        stateful: name patterns of matrices to which the density applies; the other matrices get density 0. Null: all.
        options: any other hyperparameter of FrugalConfig, such as density, update_gap, projection.
    """

    name: TuningName = "frugal"
    lr: float = 1e-4
    weight_decay: float = 0.0
    project: list[str] | None = None
    skip: list[str] | None = None
    no_decay: list[str] | None = None
    rank: int | None = None
    stateful: list[str] | None = None
    options: dict[str, Number] = field(default_factory=dict)

    def plain(self, hidden: int) -> Optimizer:
        """The same for a model of this hidden size, as pre-training has it."""
        options = dict(self.options)
        name: Any = BEHIND.get(self.name, self.name)
        chosen = {**options, **PRESETS[name]}.get("projection")
        blocks = chosen in PROJECTIONS and PROJECTIONS[str(chosen)].family == "blocks"
        if self.rank is not None and self.name not in WITHOUT_RANK and not blocks:
            options["density"] = density_of(self.rank, hidden)
        return Optimizer(
            name=name,
            lr=self.lr,
            weight_decay=self.weight_decay,
            project=self.project,
            skip=self.skip,
            no_decay=self.no_decay,
            options=options,
        )


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
class FinetuneRecipe:
    """A fine-tuning run.

    Args:
        folder: for metrics, checkpoints and the best model; a run that is there is continued.
        engine: single, ddp, fsdp2 or deepspeed.
        deepspeed: DeepSpeed JSON for that engine, from the working directory or beside the recipe; its optimizer,
            scheduler and batch sizes are the recipe's.
        epochs: passes over the training examples.
        steps: optimizer steps; 0: as many as the epochs need.
        batch: examples per step over all ranks.
        micro_batch: examples that a rank computes at once; null takes all of its share.
        length: tokens to which an example is cut; batches are padded to their longest.
        precision: bf16 (autocast, fp32 weights), fp16 (DeepSpeed only) or fp32.
        clip: largest gradient norm; 0 does not clip.
        evaluate_every: steps between two evaluations of the whole validation set; 0: once an epoch.
        log_every: steps between two lines of metrics.
        bad_steps: consecutive steps without a finite gradient that are skipped before the run gives up.
        seed: of the head, the dropout and the data order.
        trackers: tensorboard, wandb, or both, beside the metrics file.
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Tuning = field(default_factory=Tuning)
    lora: Lora = field(default_factory=Lora)
    schedule: Schedule = field(default_factory=lambda: Schedule(name="linear", warmup=0.06, floor=0.0))
    saving: Saving = field(default_factory=Saving)
    folder: str = "runs/finetune"
    engine: Literal["single", "ddp", "fsdp2", "deepspeed"] = "single"
    deepspeed: str | None = None
    epochs: float = 3.0
    steps: int = 0
    batch: int = 32
    micro_batch: int | None = None
    length: int = 128
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    clip: float = 1.0
    evaluate_every: int = 0
    log_every: int = 10
    bad_steps: int = 10
    seed: int = 0
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """All of it, for the metrics file."""
        return asdict(self)

    def as_run(self, examples: int, hidden: int) -> Recipe:
        """What the engines and the loop need to know, for so many training examples and this hidden size."""
        per_epoch = max(1, round(examples / self.batch))
        return Recipe(
            optimizer=self.optimizer.plain(hidden),
            schedule=self.schedule,
            saving=self.saving,
            folder=self.folder,
            engine=self.engine,
            deepspeed=self.deepspeed,
            steps=self.steps or max(1, round(self.epochs * examples / self.batch)),
            batch=self.batch,
            micro_batch=self.micro_batch,
            length=self.length,
            precision=self.precision,
            clip=self.clip,
            evaluate_every=self.evaluate_every or per_epoch,
            log_every=self.log_every,
            bad_steps=self.bad_steps,
            seed=self.seed,
            trackers=self.trackers,
        )


def density_of(rank: int, hidden: int) -> float:
    """The density by which a matrix of this width has so many columns with state, as the paper's fine-tuning has it."""
    density = rank / hidden
    return density if int(density * hidden) == rank else (rank + 1e-6) / hidden


def check_finetune(recipe: FinetuneRecipe) -> None:
    """ValueError for values that fit their type but not each other; names the key."""
    for key in ("batch", "length", "log_every", "bad_steps"):
        if getattr(recipe, key) < 1:
            raise ValueError(f"{key} is {getattr(recipe, key)}; it must be at least 1.")
    for key in ("steps", "evaluate_every", "clip"):
        if getattr(recipe, key) < 0:
            raise ValueError(f"{key} is {getattr(recipe, key)}; it must not be negative.")
    if not recipe.epochs > 0:
        raise ValueError(f"epochs is {recipe.epochs:g}; it must be above 0.")
    check_seed(recipe.seed)
    if recipe.micro_batch is not None and recipe.micro_batch < 1:
        raise ValueError(f"micro_batch is {recipe.micro_batch}; it must be at least 1, or null.")
    if not recipe.model.path:
        raise ValueError("model.path is not set; name a folder or hub name with the pretrained model.")
    if recipe.precision == "fp16" and recipe.engine != "deepspeed":
        raise ValueError(f"precision fp16 scales the loss, which engine {recipe.engine!r} does not do. Use bf16.")
    if recipe.deepspeed is not None and recipe.engine != "deepspeed":
        raise ValueError(f"deepspeed is {recipe.deepspeed!r}, but engine is {recipe.engine!r}. Set engine: deepspeed.")
    check_trackers(recipe.trackers)
    check_saving(recipe.saving)
    _check_data(recipe.data)
    _check_tuning(recipe.optimizer)


def _check_data(data: Data) -> None:
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


def _check_tuning(optimizer: Tuning) -> None:
    if optimizer.rank is not None and optimizer.rank < 0:
        raise ValueError(f"optimizer.rank is {optimizer.rank}; it must not be negative.")
    if optimizer.rank is not None and "density" in optimizer.options:
        raise ValueError("optimizer.rank and optimizer.options.density both say the density; set one of them.")
