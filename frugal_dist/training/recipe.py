"""Recipes: what to train, on what, with which optimizer and engine. Typed YAML; the command line sets any key.

A recipe is a shipped name (``llama_60m``) or a YAML file; ``--optimizer.lr 2e-3`` or ``--steps 100`` after it change
single keys. Unknown keys and values of the wrong type are errors that name the key.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from glob import glob
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from frugal_dist.presets import NAMED, OptimizerName
from frugal_dist.training.data.hub import nearby
from frugal_dist.training.metrics.record import check_trackers
from frugal_dist.training.spelling import (
    OPTIONS,
    ZERO,
    Keys,
    as_words,
    check_keys_of,
    fitted_file,
    keys_of,
    read_changes,
)

Number = bool | int | float | str | list[float] | list[str] | None
"""The first type that fits is taken: text stands after what would fit it as well, such as false and 1."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model.

    Args:
        llama: a LLaMA shape of the papers: 9M, 20M, 60M, 130M, 350M, 1B, 3B, 7B, or quick; or use ``path``.
        path: folder or hub name with a ``config.json``, for any AutoModelForCausalLM.
        pretrained: start from the weights in ``path`` instead of fresh ones.
        vocab_size: rows of the embedding of a ``llama`` shape; null takes the tokenizer's.
        tied: output head and input embedding are one matrix.
        attention: implementation in transformers: sdpa, eager or flash_attention_2.
        checkpointing: recompute activations in the backward pass, for memory.
        compile: torch.compile the model.
    """

    llama: str | None = None
    path: str | None = None
    pretrained: bool = False
    vocab_size: int | None = None
    tied: bool = False
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    checkpointing: bool = False
    compile: bool = False


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
class Optimizer:
    """The optimizer.

    Args:
        name: frugal, galore, badam, signsgd or adamw.
        lr: learning rate.
        weight_decay: decoupled.
        project: name patterns of all parameters that are projected; null: all matrices but embeddings, heads, routers.
        skip: name patterns of parameters that are never projected.
        no_decay: name patterns of parameters without weight decay.
        options: any other hyperparameter of FrugalConfig, each as --optimizer.options.NAME: density, update_gap,
            projection (svd, random, randperm, columns, rows, randk, blockwise), side, block_order, state_full (adamw,
            lion, sgdm), state_free (sign, sgd, none), betas, eps, momentum, projected_lr_scale, state_free_lr_scale,
            on_refresh
            (reset, keep, project), svd_method, basis_dtype, matmul, rounding, refresh_schedule,
            compute_layout, residual_threshold, seed, shard_state.
    """

    name: OptimizerName = "frugal"
    lr: float = 1e-3
    weight_decay: float = 0.0
    project: list[str] | None = None
    skip: list[str] | None = None
    no_decay: list[str] | None = None
    options: dict[str, Number] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over time, as a factor.

    Args:
        name: cosine, linear, wsd (warm-up, stable, decay) or constant.
        warmup: steps of warm-up; below 1 a share of all steps (of a cycle).
        floor: where cosine and linear end.
        cycle: steps after which cosine starts again, warm-up included; null never does. The papers train 200,000 steps
            in cycles: stopping between the ends of two cycles stops at a high learning rate.
        decay: share of all steps in which wsd falls to the floor.
    """

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup: float = 0.1
    floor: float = 0.1
    cycle: int | None = None
    decay: float = 0.2


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
class Recipe:
    """A pre-training run.

    Args:
        folder: for metrics, checkpoints and pictures; a run that is there is continued.
        engine: single, ddp, fsdp2 or deepspeed.
        deepspeed: DeepSpeed JSON for that engine, from the working directory or beside the recipe; its optimizer,
            scheduler and batch sizes are the recipe's.
        steps: optimizer steps.
        batch: sequences per step over all ranks.
        micro_batch: sequences that a rank computes at once; null takes all of its share.
        length: tokens per sequence.
        precision: bf16 (autocast, fp32 weights), fp16 (DeepSpeed only) or fp32.
        clip: largest gradient norm; 0 does not clip.
        evaluate_every: steps between two evaluations; 0 evaluates at the start and the end only.
        evaluation_tokens: predicted tokens of an evaluation, the same for every number of ranks.
        log_every: steps between two lines of metrics.
        bad_steps: consecutive steps without a finite gradient that are skipped before the run gives up.
        spike: a step whose gradient norm is above so many times the recent mean is skipped, too; 0 skips none. Not
            under DeepSpeed, whose engine takes the step itself: use clip there.
        seed: of weights and data order.
        trackers: tensorboard, wandb, or both, beside the metrics file.
        peak_tflops: the device's matmul rate, for the MFU; null takes what is known of the GPU.
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    saving: Saving = field(default_factory=Saving)
    folder: str = "runs/latest"
    engine: Literal["single", "ddp", "fsdp2", "deepspeed"] = "single"
    deepspeed: str | None = None
    steps: int = 10_000
    batch: int = 512
    micro_batch: int | None = None
    length: int = 256
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    clip: float = 0.0
    evaluate_every: int = 1000
    evaluation_tokens: int = 10_000_000
    log_every: int = 10
    bad_steps: int = 10
    spike: float = 0.0
    seed: int = 0
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    peak_tflops: float | None = None

    def record(self) -> dict[str, Any]:
        """All of it, for the metrics file."""
        return asdict(self)


def check_recipe(recipe: Recipe) -> None:
    """ValueError for values that fit their type but not each other; names the key."""
    for key in ("steps", "batch", "length", "log_every", "bad_steps"):
        if getattr(recipe, key) < 1:
            raise ValueError(f"{key} is {getattr(recipe, key)}; it must be at least 1.")
    for key in ("evaluate_every", "evaluation_tokens", "clip"):
        if getattr(recipe, key) < 0:
            raise ValueError(f"{key} is {getattr(recipe, key)}; it must not be negative.")
    check_seed(recipe.seed)
    if recipe.data.rows == "truncated" and recipe.length < 2:
        raise ValueError("length is 1; of a row per document every token but the first is predicted: use 2 or more.")
    if recipe.micro_batch is not None and recipe.micro_batch < 1:
        raise ValueError(f"micro_batch is {recipe.micro_batch}; it must be at least 1, or null.")
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
    if recipe.peak_tflops is not None and not recipe.peak_tflops > 0:
        raise ValueError(f"peak_tflops is {recipe.peak_tflops:g}; it must be above 0, or null.")
    check_trackers(recipe.trackers)
    check_saving(recipe.saving)
    if recipe.precision == "fp16" and recipe.engine != "deepspeed":
        raise ValueError(f"precision fp16 scales the loss, which engine {recipe.engine!r} does not do. Use bf16.")
    if recipe.deepspeed is not None and recipe.engine != "deepspeed":
        raise ValueError(f"deepspeed is {recipe.deepspeed!r}, but engine is {recipe.engine!r}. Set engine: deepspeed.")


def check_seed(seed: int) -> None:
    """ValueError for what numpy does not take, at the first batch."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2^32.")


def check_saving(saving: Saving) -> None:
    """ValueError for numbers that a checkpoint, maybe the last one, would be the first to refuse."""
    if saving.every < 0:
        raise ValueError(f"saving.every is {saving.every}; it must not be negative.")
    for key, value in (("keep_last", saving.keep_last), ("keep_every", saving.keep_every)):
        if value is not None and value < 1:
            raise ValueError(f"saving.{key} is {value}; it must be at least 1.")


# --- reading --------------------------------------------------------------------------------------------------------

T = TypeVar("T")


FOLDERS = {"Recipe": "recipes", "FinetuneRecipe": "recipes/finetune"}
"""Where shipped recipes of a kind lie."""
COMMANDS = {"recipes": "pretrain, compare or plan", "recipes/finetune": "finetune"}


def shipped(kind: type[Any] = Recipe) -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return _shipped(kind.__name__)


def _shipped(kind: str) -> dict[str, Path]:
    folder = Path(str(resources.files("frugal_dist.training"))) / FOLDERS[kind]
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_recipe(
    name: str,
    changes: Sequence[str] = (),
    kind: type[T] = Recipe,  # type: ignore[assignment]
) -> T:
    """The recipe of this name or file with ``--key value`` changes; ``--help`` among them prints all keys and exits.

    Raises ValueError that names the key and what is allowed.
    """
    from frugal_dist.training.yaml_file import read_yaml

    path, keys = _path_of(name, kind), keys_of(kind)
    try:
        written = _without_short_names(fitted_file(_checked(read_yaml(path), keys), keys))
    except ValueError as error:
        raise ValueError(f"recipe {name}: {error}") from error
    command = COMMANDS[FOLDERS[kind.__name__]].partition(",")[0]
    parser = recipe_parser(kind, f"frugal-dist {command} {name}")
    stage = written.pop(_STAGE, None)
    words = ["--config", json.dumps(written)]
    if {"--help", "-h"} & set(changes):
        parser.set_defaults(_flat(written, keys))
        parser.parse_args(["--help"])
    for key, value in read_changes(changes, keys):
        words += as_words(key, value, keys)
        stage = ZERO.get(value) if key == "engine" else stage
    try:
        found = parser.parse_args(words)
    except Exception as error:  # the library has several kinds of errors
        raise ValueError(f"recipe {name}: {_explained(str(error), parser)}") from error
    values = parser.instantiate(found)
    typed = {key: getattr(values, key) for key in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    typed = {**_beside(path, typed), "folder": os.path.expanduser(typed["folder"])}
    typed["deepspeed"] = _staged(typed["deepspeed"], stage)
    return kind(**typed)


_STAGE = "zero stage"


def as_yaml(recipe: Any) -> str:
    """A recipe with all its keys, as a file."""
    import yaml

    return str(yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True))


def list_recipes() -> str:
    """The shipped recipes, by the commands that take them, with what each says of itself."""
    lines = []
    for folder, commands in COMMANDS.items():
        kind = next(name for name, place in FOLDERS.items() if place == folder)
        lines += [f"for frugal-dist {commands}:"]
        for name, path in _shipped(kind).items():
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            lines.append(f"  {name:<20} {first.lstrip('# ')}")
    return "\n".join(lines)


def _checked(values: dict[str, Any], keys: Keys) -> dict[str, Any]:
    check_keys_of(values, keys)
    return values


def _without_short_names(values: dict[str, Any]) -> dict[str, Any]:
    """An engine "zero3" as "deepspeed" and its stage; an optimizer "frugal-columns" as "frugal" and its projection."""
    values = dict(values)
    if values.get("engine") in ZERO:
        values |= {"engine": "deepspeed", _STAGE: ZERO[values["engine"]]}
    optimizer = values.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.get("name") in NAMED:
        name, fixed = NAMED[optimizer["name"]]
        options = optimizer.get("options") or {}
        for key, value in fixed.items():
            if options.get(key, value) != value:
                raise ValueError(f"optimizer.name is {optimizer['name']!r}, but {OPTIONS}.{key} is {options[key]!r}.")
        values["optimizer"] = {**optimizer, "name": name, "options": {**options, **fixed}}
    return values


def _staged(named: str | None, stage: int | None) -> str | None:
    """The DeepSpeed JSON; where the engine is named by its stage and there is none, "zeroN".

    Raises ValueError for a JSON of another stage.
    """
    if stage is None or named is None:
        return named if stage is None else f"zero{stage}"
    try:
        own = json.loads(Path(named).read_text(encoding="utf-8"))["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return named  # who reads it for training says what is wrong with it
    if own != stage:
        raise ValueError(
            f"engine is 'zero{stage}', but {named} says stage {own}. Set engine: deepspeed, or change one."
        )
    return named


def _flat(values: dict[str, Any], keys: Keys, above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        section = isinstance(value, dict) and is_dataclass(keys.get(f"{above}{name}"))
        found |= _flat(value, keys, f"{above}{name}.") if section else {f"{above}{name}": value}
    return found


def _beside(recipe: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Paths as they are named or, where nothing is there, beside the recipe: it then works from any folder."""
    return {
        key: replace(value, **_beside(recipe, {one.name: getattr(value, one.name) for one in fields(value)}))
        if is_dataclass(value) and not isinstance(value, type)
        else _near(recipe.parent, value)
        if key in _PATHS and isinstance(value, str)
        else value
        for key, value in values.items()
    }


_PATHS = ("deepspeed", "path", "tokenizer", "validation_path", "source", "train", "validation")
"""Keys, in whatever section, that name files, folders or patterns of them."""


def _near(folder: Path, name: str) -> str:
    if not name:
        return name  # nothing is named; the folder itself is not meant
    given = os.path.expanduser(name)
    beside = str(folder / given)
    return beside if not _is_there(given) and _is_there(beside) else given


def _is_there(name: str) -> bool:
    return bool(name) and (Path(name).exists() or bool(glob(name, recursive=True)))


def recipe_parser(kind: type[Any], command: str = "frugal-dist ... RECIPE") -> Any:
    """The command line of a recipe: one option per key."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=command, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with any of the keys below")
    parser.add_class_arguments(kind, as_group=False)
    return parser


def _path_of(name: str, kind: type[Any]) -> Path:
    known = shipped(kind)
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_file():
        return path
    close = difflib.get_close_matches(name, known, n=1)
    file = next((f"{name}{ending}" for ending in (".yaml", ".yml") if Path(f"{name}{ending}").is_file()), "")
    hint = f" Did you mean {(file or close[0])!r}?" if file or close else nearby(name)
    if path.is_dir():
        hint = " It is a folder, a recipe is a YAML file; the folder of a model is named by --model.path."
    for folder, commands in COMMANDS.items():
        if (Path(str(resources.files("frugal_dist.training"))) / folder / f"{name}.yaml").is_file():
            hint = f" That one is for frugal-dist {commands}."
    raise ValueError(f"there is no recipe {name!r}: neither a file nor one of {', '.join(known)}.{hint}")


def _explained(message: str, parser: Any) -> str:
    """The library's words, shorter, with the known key that is closest to an unknown one."""
    text = " ".join(message.split())
    text = re.sub(r"a typing\.Literal\[([^\]]*)\]", r"one of \1", text)
    text = re.sub(r"(?:a )?<class '(\w+)'>", r"\1", text).replace("NoneType", "null")
    union = r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .* Given value: "
    text = re.sub(union, lambda kinds: f"Expected {kinds.group(1).replace(', ', ' or ')}. Got value: ", text)
    text = re.sub(r'Parser key "([\w.]+)": ', r"\1: ", text)
    known = [action.dest for action in parser._actions]
    group = re.search(r"Group '([\w.]+)'", text)
    words = [f"{group.group(1)}.{word}" if group else word for word in re.findall(r"[\w.]+", text)]
    hints = [difflib.get_close_matches(word, known, n=1, cutoff=0.8) for word in words if word not in known]
    hint = next((f" Did you mean {close[0]!r}?" for close in hints if close), "")
    return text.rstrip(".") + "." + hint
