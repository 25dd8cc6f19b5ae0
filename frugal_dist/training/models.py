"""Models to pre-train: LLaMA-style, from the shape table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from frugal_dist.planner import LLAMA_SHAPES

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def build_llama(size: str, vocab_size: int, sequence_length: int) -> LlamaForCausalLM:
    """A freshly initialised model of the named size with this vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if size not in LLAMA_SHAPES:
        raise ValueError(f"model is {size!r}; choose one of {', '.join(LLAMA_SHAPES)}.")
    shape = LLAMA_SHAPES[size]
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=sequence_length,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def token_losses(model: nn.Module, rows: Tensor) -> Tensor:
    """Cross entropy of every predicted token; rows hold one token more than the model reads."""
    logits = model(input_ids=rows[:, :-1]).logits.float()
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
