"""What a parameter's name says: user patterns, and whether it names a matrix that FRUGAL projects.

Pure text, no torch. Used where only names and shapes are known (DeepSpeed builds the optimizer from JSON and hands over
bare tensors), and by `parameters.split`, which looks at modules and asks here about output heads and routers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

# Wrappers add a component to every name below them: these anywhere in a path, `module` (DDP, DeepSpeed) at its start.
# A model's own child called `module` deeper in the path is left alone.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_LEADING_WRAPPER = "module"

# Output heads. A head may be a small network (`classifier.dense`, `cls.predictions.transform.dense`): everything below
# such a component belongs to it. Inside numbered blocks the same words mean other things (`layer.3.attention.output`,
# `blocks.0.score`), so a number earlier in the path rules a head out, except for names that never mean anything else.
_HEADS = frozenset(
    {
        "classifier",
        "cls",
        "head",
        "heads",
        "lm_loss",
        "output_layer",
        "output_projection",
        "pred_layer",
        "proj_out",
        "qa_outputs",
        "score",
        "vocab_projector",
    }
)
_HEAD_ENDINGS = ("*_head", "*_heads", "*logits", "*_logits_*", "logits_*")
_NO_HEADS = ("multi_head*", "attn_head*", "attention_head*")
_HEADS_EVERYWHERE = ("*lm_head", "embed_out")
# Heads only as the last module of the path: elsewhere they name whole sub-models (T5's `decoder.block.0`).
_HEADS_AT_THE_END = frozenset({"output", "decoder", "projection", "unembed", "unembedding"})
# `feature_projection.projection`: a part of a module that maps something else than the model's output.
_MAPS = ("*projection*", "*embed*")

# A head of any name: a matrix of the shape of the largest embedding, outside numbered blocks. MLPs are four times as
# wide as the model, vocabularies more than three times; at exactly four it is not told.
_VOCABULARY = 3
_MLP = 4

_ADAPTERS = ("lora_*",)

_EMBEDDINGS = ("*embed*", "wte", "wpe", "emb", "*_emb", "shared", "relative_attention_bias")
# Linear layers that map an embedding to the model's width carry its name (`embed_proj`, `embeddings_project`).
_EMBEDDING_MAPS = ("*proj*", "*mapping*")

_ROUTERS = ("router", "*_router", "router_gate", "shared_expert_gate")
_SUGGESTIONS = 4


def clean_name(name: str) -> str:
    """`name` without the components that DDP, FSDP, Fabric, torch.compile and activation checkpointing put in."""
    kept = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(kept) > 1 and kept[0] == _LEADING_WRAPPER:
        kept = kept[1:]
    return ".".join(kept)


def matches(name: str, patterns: Sequence[str] | None) -> bool:
    """True if any glob pattern fits the whole parameter name or a dotted suffix of it.

    `*` also crosses dots, case counts. All of these fit `model.layers.3.self_attn.q_proj.weight`: `*.weight`,
    `q_proj.weight`, `layers.3.*`, `*q_proj*`; but not `q_proj`, which names a module. Wrapper components such as
    `module.` or `_orig_mod.` need not be written. None and [] fit nothing.
    """
    if not patterns:
        return False
    forms = {form for full in (name, clean_name(name)) for form in _suffixes(full)}
    return any(fnmatchcase(form, pattern) for pattern in patterns for form in forms)


def check_patterns(names: Sequence[str], patterns: Sequence[str] | None, key: str) -> None:
    """Raise ValueError if a pattern of the argument called `key` matches none of `names`, or if it is not a list."""
    if patterns is None:
        return
    if isinstance(patterns, str):
        raise ValueError(f'{key} must be a list of name patterns, found the text "{patterns}": write ["{patterns}"].')
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f'{key}: the pattern "{pattern}" matches no parameter. {_advice(names, pattern)}')


@dataclass(frozen=True)
class Choice:
    """Which parameters are projected, where only names and shapes are known.

    `project`: these patterns instead of `is_projected_name`; `skip`: never these; `tables`: shapes of embeddings.
    """

    project: Sequence[str] | None = None
    skip: Sequence[str] | None = None
    tables: frozenset[tuple[int, ...]] = frozenset()

    @property
    def asked(self) -> bool:
        """Whether there are patterns."""
        return self.project is not None or self.skip is not None

    def __call__(self, name: str, shape: Sequence[int]) -> bool:
        """Whether this one is projected."""
        if matches(name, self.skip):
            return False
        if self.project is not None:
            return matches(name, self.project)
        return is_projected_name(name, shape) and not is_vocabulary_sized(name, shape, self.tables)


def is_projected_name(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is projected, judged by its name and shape (rows, columns) or (experts, rows, columns).

    Every 2-D `...weight` is, except embeddings, output heads, routers and LoRA's adapters, and so is every 3-D stack of
    expert matrices. Agrees with `split_parameters` on LLaMA, Mistral, Qwen, GPT-2, GPT-NeoX, OPT, BLOOM, BERT, RoBERTa,
    T5, Mixtral and Qwen-MoE; for models with unusual names pass the groups of `split_parameters` instead, which looks
    at the modules.
    """
    name = clean_name(name)
    if min(shape, default=0) < 2 or is_head(name) or is_router(name, shape) or is_adapter(name):
        return False
    if len(shape) == 3:
        return is_expert_stack(name)
    return len(shape) == 2 and _is_weight(name) and not _is_embedding(name)


def is_table_name(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is the matrix of an embedding, judged by its name."""
    return len(shape) == 2 and _is_weight(name) and _is_embedding(clean_name(name))


def is_head(name: str) -> bool:
    """Whether the parameter called `name` belongs to an output head (see the lists at the top of this file)."""
    path = clean_name(name).split(".")[:-1]
    if any(_fits(part, _HEADS_EVERYWHERE) for part in path):
        return True
    outside_blocks = _outside_blocks(path)
    if any(part in _HEADS or _is_head_name(part) for part in outside_blocks):
        return True
    if not path or outside_blocks != path or path[-1] not in _HEADS_AT_THE_END:
        return False
    return len(path) == 1 or not _fits(path[-2], _MAPS)


def is_vocabulary_sized(name: str, shape: Sequence[int], tables: Iterable[tuple[int, ...]]) -> bool:
    """Whether a matrix outside numbered blocks has the shape of the largest of the embeddings: an output head."""
    path = clean_name(name).split(".")[:-1]
    largest = max(tables, default=None)
    if largest is None or tuple(shape) != largest or _outside_blocks(path) != path:
        return False
    return shape[0] > _VOCABULARY * shape[1] and shape[0] != _MLP * shape[1]


def is_adapter(name: str) -> bool:
    """Whether the parameter is LoRA's, of peft, torchtune or kohya: a few rows or columns, which need no projection."""
    return any(_fits(part.lower(), _ADAPTERS) for part in clean_name(name).split("."))


def _is_head_name(part: str) -> bool:
    return _fits(part, _HEAD_ENDINGS) and not _fits(part, _NO_HEADS)


def _outside_blocks(path: list[str]) -> list[str]:
    """The components before the first number."""
    return path[: next((i for i, part in enumerate(path) if part.isdigit()), len(path))]


def is_router(name: str, shape: Sequence[int]) -> bool:
    """Whether a 2-D weight routes tokens to experts.

    Routers stay regular: they have one row per expert, so there is nothing to save, and the sign noise of a state-free
    step flips routing decisions. A `gate` with at least as many rows as columns is that of a gated MLP, not a router.
    """
    path = clean_name(name).split(".")[:-1]
    if any(_fits(part, _ROUTERS) for part in path):
        return True
    return "gate" in path and len(shape) == 2 and shape[0] < shape[1]


def is_expert_stack(name: str, owner: str = "") -> bool:
    """Whether a 3-D parameter is a stack of expert matrices, by its name and the class name `owner` of its module.

    transformers keeps experts as `...experts.gate_up_proj` (experts, rows, columns), or in classes such as
    `GraniteMoeParallelExperts`. 3-D convolution weights, biases and quantisation scales are none.
    """
    *path, last = clean_name(name).lower().split(".")
    if last.endswith("bias") or "scale" in last or any("conv" in part for part in path):
        return False
    return any("expert" in part or "moe" in part for part in [*path, last, owner.lower()])


def _is_weight(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "weight" or last.endswith("proj_weight")  # the latter: nn.MultiheadAttention


def _is_embedding(name: str) -> bool:
    module = name.rpartition(".")[0].rpartition(".")[2]
    return _fits(module, _EMBEDDINGS) and not _fits(module, _EMBEDDING_MAPS)


def _fits(part: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(part, pattern) for pattern in patterns)


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _advice(names: Sequence[str], pattern: str) -> str:
    """What to write instead of a pattern that matches nothing."""
    for wider in (f"{pattern}.*", f"*{pattern}*"):
        if any(matches(name, [wider]) for name in names):
            return f'Patterns fit whole parameter names or dotted suffixes of them: did you mean "{wider}"?'
    candidates = {form: name for name in names for form in reversed(_suffixes(clean_name(name)))}
    close = difflib.get_close_matches(pattern, candidates, n=_SUGGESTIONS, cutoff=0.5)
    shown = sorted({candidates[form] for form in close}) or [clean_name(name) for name in names[:_SUGGESTIONS]]
    return f"Close names: {', '.join(shown)}." if close else f"Names look like: {', '.join(shown)}."
