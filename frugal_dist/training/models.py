"""Models to pre-train: LLaMA shapes of the papers, or any causal language model of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from frugal_dist.planner import LLAMA_SHAPES
from frugal_dist.training.data.batches import IGNORED
from frugal_dist.training.data.local_or_hub import settle_source
from frugal_dist.training.recipe import Model

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM


def build_model(recipe: Model, vocab_size: int, length: int, separator: int | None = None) -> nn.Module:
    """The recipe's model, in fp32. ``vocab_size``: what the tokenizer has; ``length``: tokens per sequence.

    ``separator``: the token that ends documents, with which a fresh LLaMA will end its texts.

    Raises ValueError if the model cannot hold the tokenizer's vocabulary, or the folder holds no model.
    """
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    if recipe.vocab_size is not None and recipe.vocab_size < vocab_size:
        raise ValueError(f"model.vocab_size is {recipe.vocab_size}, but the tokenizer has {vocab_size} tokens.")
    if recipe.llama is not None:
        config: Any = llama_config(recipe.llama, recipe.vocab_size or vocab_size, length, separator)
    else:
        config = read_causal_config(recipe.path or "")
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"the model in {recipe.path} has {config.vocab_size} tokens, the tokenizer {vocab_size}: they do not fit."
        )
    config.tie_word_embeddings = recipe.tied or (recipe.llama is None and config.tie_word_embeddings)
    config._attn_implementation = recipe.attention
    auto: Any = AutoModelForCausalLM  # transformers' own hints are incomplete
    model: Any
    if recipe.pretrained:
        try:
            model = auto.from_pretrained(recipe.path, config=config, dtype="float32")
        except (OSError, ValueError) as error:
            why = _no_causal_model(recipe, config, error)
            raise ValueError(f"model.pretrained: no weights can be read from {recipe.path!r}: {why}") from error
    elif recipe.llama is not None:
        model = LlamaForCausalLM(config)
    else:
        try:
            model = auto.from_config(config)
        except ValueError as error:
            raise ValueError(_no_causal_model(recipe, config, error)) from error
    if recipe.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.compile:
        model.compile()
    built: nn.Module = model
    return built


def _no_causal_model(recipe: Model, config: Any, error: Exception) -> str:
    """Why transformers cannot build it, by the words of its error."""
    text = str(error).strip()
    if "attention implementation" in text and recipe.attention in text.replace("scaled_dot_product_attention", "sdpa"):
        kind = config.model_type
        return f"model.attention is {recipe.attention!r}, which a {kind} model does not have. Set it to eager."
    if "Unrecognized configuration class" in text:
        return f"model.path is {recipe.path!r}, a {config.model_type} model: it is no causal language model."
    return text


_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions")
"""What configurations call the number of their positions."""
_ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim", "rotary_pct", "partial_rotary_factor")


def check_positions(model: nn.Module, tokens: int, key: str = "length") -> str:
    """Whether the model can read so many tokens at once; a sentence for the user if it can, but was not made for it.

    Raises ValueError, naming the recipe's ``key``, if it has no positions for them: a learned table ends where it ends.
    Rotary positions can be computed for any place.
    """
    config: Any = getattr(model, "config", None)
    name, limit = next(((one, getattr(config, one)) for one in _LIMITS if getattr(config, one, None)), ("", None))
    name = getattr(config, "attribute_map", {}).get(name, name)
    table = _table_of_positions(model)
    if table is not None and (limit is None or table < limit):
        name, limit = "its table of positions", table
    if not isinstance(limit, int) or not 0 < limit < tokens or getattr(config, "alibi", None):
        return ""
    computed = any(getattr(config, one, None) is not None for one in _ROTARY) or _grows(model)
    if table is None and computed:
        return f"{key} asks for {tokens:,} tokens at once; the model's configuration says {name} {limit:,}."
    raise ValueError(
        f"{key} asks for {tokens:,} tokens at once, but the model has positions for {limit:,} ({name}). Lower {key}; a "
        "model with fresh weights may get a larger number in its config.json."
    )


def _grows(model: nn.Module) -> bool:
    """Whether it computes a longer table of sines where it needs one, as XGLM does."""
    return any("position" in name and hasattr(module, "make_weights") for name, module in model.named_modules())


def _table_of_positions(model: nn.Module) -> int | None:
    """Rows of the learned or stored table of positions that tokens can use; None if there is none."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        counts = (last == "wpe" or "position" in last) and "relative" not in name
        if counts and isinstance(module, nn.Embedding) and not hasattr(module, "make_weights"):
            padding = module.padding_idx  # RoBERTa counts from the place after it
            own = getattr(module, "offset", 0)  # of OPT and its kin
            return module.num_embeddings - (own or (0 if padding is None else padding + 1))
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] == "embed_positions" and buffer.dim() == 2:  # of GPT-J and CodeGen
            return buffer.shape[0]
    return None


def read_causal_config(path: str) -> Any:
    """The configuration of a model. ValueError if there is none."""
    settle_source(path, "model.path")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model.path is {path!r}, where no model's config.json can be read: {reason}") from error


def llama_config(size: str, vocab_size: int, length: int, separator: int | None = None) -> LlamaConfig:
    """The configuration of a LLaMA shape. Raises ValueError that lists the shapes.

    Texts begin and end with the ``separator``: it stands between those of packed rows. No token is for padding, whose
    embedding would not be trained.
    """
    from transformers import LlamaConfig

    if size not in LLAMA_SHAPES:
        raise ValueError(f"model is {size!r}; choose one of {', '.join(LLAMA_SHAPES)}.")
    shape = LLAMA_SHAPES[size]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=length,
        use_cache=False,  # of no use in training; an export has it
        bos_token_id=separator,
        eos_token_id=separator,
    )


def build_llama(size: str, vocab_size: int, sequence_length: int, separator: int | None = None) -> LlamaForCausalLM:
    """A freshly initialised model of the named size with this vocabulary."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(llama_config(size, vocab_size, sequence_length, separator))


def token_losses(model: nn.Module, rows: Tensor) -> Tensor:
    """Cross entropy of every predicted token; rows hold one token more than the model reads.

    Rows may be padded at their end with IGNORED, whose loss is 0; the real tokens before it cannot see it.
    """
    logits = model(input_ids=rows[:, :-1].clamp(min=0)).logits.float()
    targets = rows[:, 1:].flatten()
    return functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none", ignore_index=IGNORED)


# --- dropout: each rank draws masks of its own, or all would drop the same places of their sequences -------


_RANKS_APART = 1_000_003
"""Between the seeds of the ranks."""


def seed_masks(seed: int, rank: int) -> None:
    """Let this rank draw its own masks from here on. Weights that must be equal are made before."""
    torch.manual_seed(seed + _RANKS_APART * (1 + rank))


def has_dropout(model: nn.Module) -> bool:
    """Whether a model drops anything in training, by its modules and by what its configuration says of itself."""
    if any(module.p > 0 for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)):
        return True
    # Some models call the function instead of a module, with a share from the configuration.
    config = getattr(model, "config", None)
    told = {} if config is None else vars(config)
    return any("drop" in key and isinstance(share, int | float) and share > 0 for key, share in told.items())
