"""The model that a checkpoint of any engine holds, as transformers has it, with its tokenizer; on one process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from frugal_dist.checkpoint import SavedWeights
from frugal_dist.training.folders import checkpoint_in, run_of, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN = 5


@dataclass(frozen=True)
class Restored:
    """``source``: the checkpoint. ``tokenizer`` is None where there is none; ``trouble`` may say why."""

    model: PreTrainedModel
    source: Path
    dtype: str
    tokenizer: Any = None
    tokenizer_source: str | None = None
    trouble: str = ""

    @property
    def parameters(self) -> int:
        """Tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def restore(
    checkpoint: Path,
    config: Path | None = None,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    verify: bool = True,
    runs: bool = False,
) -> Restored:
    """The model in a checkpoint; arguments and errors are those of ``export``.

    ``runs``: the model shall compute; otherwise its buffers that are not saved have no memory.
    """
    check_dtype(dtype)
    weights = SavedWeights(checkpoint_in(checkpoint), verify)
    with without_deepspeeds_search():
        model = _empty_model(_config(weights, config), "cpu" if runs else "meta")
        _check_names(weights, model)
        _fill(weights, model, None if dtype is None else DTYPES[dtype])
        dtype_name = _dtype_name(model)
        model.config.dtype = dtype_name
        words, source, trouble = _tokenizer(tokenizer, weights.folder, model)
    return Restored(model, weights.folder, dtype_name, words, source, trouble)


def check_dtype(dtype: str | None) -> None:
    """ValueError for a dtype that models are not saved in."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")


@contextmanager
def without_deepspeeds_search() -> Iterator[None]:
    """Transformers may import DeepSpeed, which looks for an accelerator and warns if there is none; none is needed."""
    key = "DS_ACCELERATOR"
    if key in os.environ or torch.cuda.is_available():
        yield
        return
    os.environ[key] = "cpu"
    try:
        yield
    finally:
        del os.environ[key]


def _config(weights: SavedWeights, path: Path | None) -> PreTrainedConfig:
    from transformers import AutoConfig

    if path is None:
        plain, source = weights.model_config, f"{weights.folder}, as it was saved"
        if plain is None:
            raise ValueError(f"{weights.folder} holds no model configuration; give one with --config.")
    else:
        file = path / "config.json" if path.is_dir() else path
        plain, source = _json(file), str(file)
    kind = plain.get("model_type")
    try:
        config = AutoConfig.for_model(**plain)
        if path is None and not _classifies(config) and hasattr(config, "use_cache"):
            config.use_cache = True  # which training switches off
        return config
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"the configuration of {source} (model_type {kind!r}) is of no known model: {error}"
        ) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the model configuration {file}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{file} is no model configuration.")
    return plain


def _empty_model(config: PreTrainedConfig, device: str) -> PreTrainedModel:
    """The model's structure; on the meta device without memory for its weights."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto: Any = AutoModelForSequenceClassification if _classifies(config) else AutoModelForCausalLM
    build = auto.from_config
    with torch.device(device):
        model: PreTrainedModel = build(config)
    return model


def _classifies(config: PreTrainedConfig) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    """All names of every distinct parameter: tied weights have several."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    return aliases


def _check_names(weights: SavedWeights, model: nn.Module) -> None:
    """Every parameter under one of its names, in its shape, and none left over."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    missing = [names[0] for names in _aliases(model).values() if not any(name in weights for name in names)]
    unknown = [name for name in weights.shapes if name not in shapes]
    wrong = [
        f"{name} is {weights.shapes[name]} in the checkpoint, {shapes[name]} in the model"
        for name in weights.shapes
        if name in shapes and weights.shapes[name] != shapes[name]
    ]
    titled = {"missing from the checkpoint": missing, "unknown to the model": unknown, "of another shape": wrong}
    troubles = [f"{title}: {_some(names)}" for title, names in titled.items() if names]
    if troubles:
        raise ValueError(
            f"{weights.folder} does not fit {type(model).__name__} with this configuration. Parameters "
            f"{'; '.join(troubles)}."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _fill(weights: SavedWeights, model: nn.Module, dtype: torch.dtype | None) -> None:
    """One tensor at a time; tied ones once, under all their names."""
    for names in _aliases(model).values():
        saved = next(name for name in names if name in weights)
        tensor = weights[saved]
        parameter = nn.Parameter(tensor if dtype is None else tensor.to(dtype), requires_grad=False)
        for name in names:
            module, leaf = _place(model, name)
            module.register_parameter(leaf, parameter)
    persistent = set(model.state_dict().keys())
    for name, _ in list(model.named_buffers()):
        if name in persistent:
            module, leaf = _place(model, name)
            module.register_buffer(leaf, weights.buffer(name))


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _dtype_name(model: nn.Module) -> str:
    """Of most of the weights."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return str(max(counts, key=lambda dtype: counts[dtype])).removeprefix("torch.")


def _tokenizer(given: Path | None, checkpoint: Path, model: PreTrainedModel) -> tuple[Any, str | None, str]:
    """The tokenizer, where it is from, and why there is none: only one that was asked for has to be there."""
    if given is not None:
        return _read_tokenizer(str(given), model), str(given), ""
    run = run_of(checkpoint)
    source = None if run is None else tokenizer_of(run)
    if source is None:
        return None, None, ""
    try:
        return _read_tokenizer(source, model), source, ""
    except ValueError as error:
        return None, None, f"the run's cannot be taken: {error}"


def _read_tokenizer(source: str, model: PreTrainedModel) -> Any:
    """ValueError if there is none, or it does not fit the model."""
    from frugal_dist.training.data.local_or_hub import looks_local
    from frugal_dist.training.data.tokenizer import ids_in_text

    path = Path(source)
    if not path.exists() and looks_local(source):
        raise ValueError(f"the tokenizer {source} does not exist.")
    try:
        whole = not path.exists() or (path / "tokenizer_config.json").exists()
        tokenizer: Any = _by_transformers(source) if whole else _of_a_file(path)
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"cannot read the tokenizer {source}: {reason}.") from error
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    fast = getattr(tokenizer, "backend_tokenizer", None)
    size = len(tokenizer) if fast is None else ids_in_text(fast, tokenizer.eos_token_id)
    if size > rows:
        raise ValueError(f"the tokenizer {source} has {size} tokens, the model's vocabulary {rows}.")
    return tokenizer


def _by_transformers(source: str) -> Any:
    from transformers import AutoTokenizer

    from frugal_dist.training.data.local_or_hub import settle_source

    settle_source(source, "--tokenizer")
    return AutoTokenizer.from_pretrained(source)


def _of_a_file(path: Path) -> Any:
    """A tokenizer.json alone, as folders of prepared data have it, with what its special tokens are for."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from frugal_dist.training.data.prepared import read_description
    from frugal_dist.training.data.tokenizer import special_tokens

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        raise ValueError("neither tokenizer_config.json nor tokenizer.json is there")
    data = read_description(file.parent) if file.name == "tokenizer.json" else None
    fast: Any = PreTrainedTokenizerFast
    names = special_tokens(Tokenizer.from_file(str(file)), None if data is None else data.separator)
    return fast(tokenizer_file=str(file), **names)


# --- a model to be used -----------------------------------------------------------------------------------------------


def open_model(path: Path, tokenizer: Path | None = None, dtype: str | None = None) -> Restored:
    """The model of a run, of a checkpoint, or in a folder that transformers reads, such as an export; it computes.

    ``tokenizer`` and ``dtype``: as of ``restore``. Raises ValueError if no model is there.
    """
    if not (path / "config.json").is_file():
        return restore(path, tokenizer=tokenizer, dtype=dtype, runs=True)
    check_dtype(dtype)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    with without_deepspeeds_search():
        try:
            config = AutoConfig.from_pretrained(path)
            auto: Any = AutoModelForSequenceClassification if _classifies(config) else AutoModelForCausalLM
            model = auto.from_pretrained(path, dtype="auto" if dtype is None else DTYPES[dtype])
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} holds no model that transformers reads: {error}") from error
        source = tokenizer or (path if (path / "tokenizer_config.json").is_file() else None)
        words = None if source is None else _read_tokenizer(str(source), model)
    return Restored(model, path, _dtype_name(model), words, None if source is None else str(source))
