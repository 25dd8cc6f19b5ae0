"""What a recipe can say: a run of any kind, and a pre-training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from frugal_dist.training.metrics.record import check_trackers
from frugal_dist.training.optimizers import AnyOptimizer, Optimizer, check_optimizer
from frugal_dist.training.schedule import Schedule, build_schedule
from frugal_dist.update.remainder import REMAINDER


@dataclass(frozen=True, kw_only=True)
class AnyModel:
    """How the model of any recipe computes.

    Args:
        attention: implementation in transformers: sdpa, eager or flash_attention_2.
        checkpointing: recompute activations in the backward pass, for memory.
        compile: torch.compile the model.
    """

    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class Model(AnyModel):
    """The model.

    Args:
        llama: a LLaMA shape of the papers: 9M, 20M, 60M, 130M, 350M, 1B, 3B, 7B, or quick; or use ``path``.
        path: folder or hub name with a ``config.json``, for any AutoModelForCausalLM.
        pretrained: start from the weights in ``path`` instead of fresh ones.
        vocab_size: rows of the embedding of a ``llama`` shape; null takes the tokenizer's.
        tied: output head and input embedding are one matrix.
    """

    llama: str | None = None
    path: str | None = None
    pretrained: bool = False
    vocab_size: int | None = None
    tied: bool = False


@dataclass(frozen=True, kw_only=True)
class Data:
    """The text.

    Args:
        kind: tokens (a folder of token files), c4 (streamed), hub (any dataset), files (text, JSONL, parquet).
        path: the folder, the dataset's name, or a pattern of file names.
        name: configuration of a hub dataset, for C4 "en".
        column: the column that holds the text.
        tokenizer: folder, file or hub name.
        rows: packed (documents one after the other, separated) or truncated (a row per document, as in the papers).
        documents: what a document of a text file is: line, paragraph (up to an empty line) or file.
        split: the training split of a dataset.
        validation_split: its validation split.
        validation_path: like path, where the source has no validation split of its own.
        shuffle_buffer: documents among which a stream is shuffled.
        streams: parts of a stream that are read side by side; it divides the batch. Null: 8, or the next smaller number
            that does. Batches depend on this number, not on that of the ranks. More ranks than streams read the same
            text several times.
        workers: threads in which every rank reads and tokenizes streams ahead.
        epochs: how often the training text may be gone through; fewer passes than the steps need are an error.
    """

    kind: Literal["tokens", "c4", "hub", "files"] = "tokens"
    path: str | None = None
    name: str | None = None
    column: str = "text"
    tokenizer: str | None = None
    rows: Literal["packed", "truncated"] = "packed"
    documents: Literal["line", "paragraph", "file"] = "line"
    split: str = "train"
    validation_split: str = "validation"
    validation_path: str | None = None
    shuffle_buffer: int = 10_000
    streams: int | None = None
    workers: int = 2
    epochs: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Checkpoints.

    Args:
        every: steps between two; 0 saves at the end only.
        keep_last: how many of the newest stay.
        keep_every: checkpoints of steps divisible by it stay for good.
        on_error: raise, or warn and go on training when the disk is full or read-only.
    """

    every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None
    on_error: Literal["raise", "warn"] = "warn"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of any kind.

    Args:
        folder: for metrics, checkpoints and what else it leaves behind; a run that is there is continued.
        engine: single, ddp, fsdp2 or deepspeed.
        tp: ranks that divide each layer among them (tensor parallelism), with engine fsdp2; the others shard.
        deepspeed: DeepSpeed JSON for that engine, from the working directory or beside the recipe; its optimizer,
            scheduler and batch sizes are the recipe's.
        steps: optimizer steps.
        batch: sequences per step over all ranks.
        micro_batch: sequences that a rank computes at once; null takes all of its share.
        length: tokens per sequence.
        precision: of forward and backward pass: bf16, fp16 (DeepSpeed only) or fp32.
        weights: fp32, or bf16 with torch's engines: half the bytes of weights and gradients. What bf16 would round off
            every step optimizer.options.rounding keeps: remainder (all of it), stochastic (on average) or nearest (no).
        clip: largest gradient norm; 0 does not clip.
        evaluate_every: steps between two evaluations; 0 evaluates at the start and the end only.
        log_every: steps between two lines of metrics.jsonl; in a log file a line every 15 seconds is shown.
        bad_steps: consecutive steps without a finite gradient that are skipped before the run gives up.
        seed: of weights, masks of dropout and data order.
        trackers: tensorboard, wandb, prometheus (FOLDER/metrics.prom), or several, beside the metrics file.
    """

    SHIPPED = ""
    """The folder of the recipes that come with the package."""

    optimizer: AnyOptimizer = field(default_factory=AnyOptimizer)
    schedule: Schedule = field(default_factory=Schedule)
    saving: Saving = field(default_factory=Saving)
    folder: str = "runs/latest"
    engine: Literal["single", "ddp", "fsdp2", "deepspeed"] = "single"
    tp: int = 1
    deepspeed: str | None = None
    steps: int = 10_000
    batch: int = 512
    micro_batch: int | None = None
    length: int = 256
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    weights: Literal["fp32", "bf16"] = "fp32"
    clip: float = 0.0
    evaluate_every: int = 1000
    log_every: int = 10
    bad_steps: int = 10
    seed: int = 0
    trackers: list[Literal["tensorboard", "wandb", "prometheus"]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """All of it, for the metrics file."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Recipe(Run):
    """A pre-training run.

    Args:
        evaluation_tokens: predicted tokens of an evaluation, the same for every number of ranks.
        release_gradients: step inside backward, with each gradient as soon as it is there, and free it
            (``frugal_dist.step_in_backward``). With engine single or fsdp2, without micro-batches, clip and spike.
            Steps with gradients that are not finite are not skipped.
        spike: a step whose gradient norm is above so many times the recent mean is skipped, too; 0 skips none. Not
            under DeepSpeed, whose engine takes the step itself: use clip there.
        peak_tflops: the device's matmul rate, for the MFU; null takes what is known of the GPU.
    """

    SHIPPED = "recipes"

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluation_tokens: int = 10_000_000
    release_gradients: bool = False
    spike: float = 0.0
    peak_tflops: float | None = None


def check_run(run: Run) -> None:
    """ValueError for values that fit their type but not each other; names the key."""
    for key in ("batch", "length", "log_every", "bad_steps", "tp"):
        if getattr(run, key) < 1:
            raise ValueError(f"{key} is {getattr(run, key)}; it must be at least 1.")
    for key in ("steps", "evaluate_every", "clip"):
        if getattr(run, key) < 0:
            raise ValueError(f"{key} is {getattr(run, key)}; it must not be negative.")
    if not 0 <= run.seed < 2**32:  # what numpy takes, at the first batch
        raise ValueError(f"seed is {run.seed}; it must be at least 0 and below 2^32.")
    if run.micro_batch is not None and run.micro_batch < 1:
        raise ValueError(f"micro_batch is {run.micro_batch}; it must be at least 1, or null.")
    if run.precision == "fp16" and run.engine != "deepspeed":
        raise ValueError(f"precision fp16 scales the loss, which engine {run.engine!r} does not do. Use bf16.")
    if run.weights == "bf16" and run.engine == "deepspeed":
        raise ValueError("weights is 'bf16', but DeepSpeed has bf16 weights and fp32 masters by itself. Leave it out.")
    if run.weights == "bf16" and run.precision != "bf16":
        raise ValueError(f"weights is 'bf16', but precision is {run.precision!r}. Set precision: bf16.")
    if run.optimizer.options.get("rounding") == REMAINDER and run.weights != "bf16":
        raise ValueError(
            "optimizer.options.rounding is 'remainder', which completes bf16 weights, but weights is 'fp32'. Set "
            "weights: bf16, with engine single, ddp or fsdp2."
        )
    if run.deepspeed is not None and run.engine != "deepspeed":
        raise ValueError(f"deepspeed is {run.deepspeed!r}, but engine is {run.engine!r}. Set engine: deepspeed.")
    if run.tp > 1 and run.engine != "fsdp2":
        raise ValueError(f"tp is {run.tp}, but engine is {run.engine!r}. Set engine: fsdp2.")
    check_trackers(run.trackers)
    saving = run.saving  # a checkpoint, maybe the last one, would be the first to refuse it
    if saving.every < 0:
        raise ValueError(f"saving.every is {saving.every}; it must not be negative.")
    for key, value in (("keep_last", saving.keep_last), ("keep_every", saving.keep_every)):
        if value is not None and value < 1:
            raise ValueError(f"saving.{key} is {value}; it must be at least 1.")


def _check_release(recipe: Recipe) -> None:
    """ValueError for what needs all gradients at once. Micro-batches of several ranks: ``check_world``."""
    key = "release_gradients"
    if recipe.engine not in ("single", "fsdp2"):
        why = "DDP keeps all gradients in its buckets" if recipe.engine == "ddp" else "DeepSpeed owns the gradients"
        raise ValueError(f"{key}: engine is {recipe.engine!r}, and {why}. Use engine: fsdp2, or single on one process.")
    for name in ("clip", "spike"):
        if getattr(recipe, name):
            raise ValueError(
                f"{key}: {name} is {getattr(recipe, name):g}, and the norm of all gradients is known only when each "
                f"has been stepped with. Set {name}: 0; optimizer.options.growth_limit limits each matrix of the rules "
                "that take it."
            )
    if recipe.model.compile:
        raise ValueError(
            f"{key}: with model.compile all gradients come at the end of the backward pass, so that nothing would be "
            "saved. Leave out one of the two."
        )
    if recipe.engine == "single":
        check_released_share(recipe, recipe.batch)


def check_released_share(recipe: Recipe, share: int) -> None:
    """ValueError if a rank's share of the batch takes several micro-batches, whose gradients would have to wait."""
    if recipe.release_gradients and recipe.micro_batch is not None and recipe.micro_batch < share:
        raise ValueError(
            f"release_gradients: micro_batch is {recipe.micro_batch} and a rank's share of the batch {share}, but "
            "gradients that add up over micro-batches have to be kept. Leave micro_batch out, lower batch or use more "
            "ranks; model.checkpointing saves activations."
        )


def check_recipe(recipe: Recipe) -> None:
    """As ``check_run``, for a pre-training."""
    if recipe.steps < 1:
        raise ValueError(f"steps is {recipe.steps}; it must be at least 1.")
    check_run(recipe)
    if recipe.evaluation_tokens < 0:
        raise ValueError(f"evaluation_tokens is {recipe.evaluation_tokens}; it must not be negative.")
    if recipe.data.rows == "truncated" and recipe.length < 2:
        raise ValueError("length is 1; of a row per document every token but the first is predicted: use 2 or more.")
    for key in ("shuffle_buffer", "workers"):
        if getattr(recipe.data, key) < 1:
            raise ValueError(f"data.{key} is {getattr(recipe.data, key)}; it must be at least 1.")
    if not recipe.data.epochs > 0:
        raise ValueError(f"data.epochs is {recipe.data.epochs:g}; it must be above 0.")
    if recipe.data.kind == "tokens" and recipe.data.validation_path is not None:
        raise ValueError(
            f"data.validation_path is {recipe.data.validation_path!r}, but token files have their validation in "
            "data.path, held back by `frugal-dist data prepare`. Leave it out."
        )
    if (recipe.model.llama is None) == (recipe.model.path is None):
        raise ValueError("model.llama and model.path: set one of them, the shape of the papers or a folder.")
    if recipe.model.pretrained and recipe.model.path is None:
        raise ValueError("model.pretrained needs model.path, the folder with the weights.")
    if recipe.spike and not recipe.spike > 1:
        raise ValueError(f"spike is {recipe.spike:g}; it must be above 1, or 0 to skip no spikes.")
    if recipe.spike and recipe.engine == "deepspeed":
        raise ValueError("spike: DeepSpeed's engine takes its steps itself. Use clip, or engine ddp or fsdp2.")
    if recipe.release_gradients:
        _check_release(recipe)
    if recipe.peak_tflops is not None and not recipe.peak_tflops > 0:
        raise ValueError(f"peak_tflops is {recipe.peak_tflops:g}; it must be above 0, or null.")
    check_optimizer(recipe.optimizer)
    build_schedule(recipe.schedule, recipe.steps)
