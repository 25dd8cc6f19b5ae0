"""Tiny Hugging Face models built from their configs, offline: one per family that name rules must know.

Sizes keep the proportions that the rules look at: fewer experts than hidden units, a vocabulary unlike any other size.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = {**_COMMON, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": 96, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
_T5 = {"vocab_size": 96, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}

# family: (model class, config class, config, names of 2-D parameters and larger that must be regular)
ZOO: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA, ("lm_head", "embed_tokens")),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}, ("embed_tokens",)),
    "llama-classifier": ("LlamaForSequenceClassification", "LlamaConfig", _LLAMA, ("score", "embed_tokens")),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA, ("lm_head", "embed_tokens")),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA, ("lm_head", "embed_tokens")),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 4}, ("lm_head", "embed_tokens")),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, "bos_token_id": 1, "eos_token_id": 2}, ("wte", "wpe")),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _COMMON, ("embed_in", "lm_head", "embed_out")),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_COMMON, "ffn_dim": 24, "word_embed_proj_dim": 8},
        ("embed_tokens", "embed_positions"),
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 96, "hidden_size": 16, "n_layer": 2, "n_head": 4},
        ("word_embeddings",),
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _COMMON, ("*_embeddings", "cls.predictions.transform.dense")),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", _COMMON, ("*_embeddings", "classifier")),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _COMMON, ("*_embeddings", "lm_head.dense")),
    "roberta-classifier": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _COMMON,
        ("*_embeddings", "classifier.dense", "classifier.out_proj"),
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5, ("shared", "relative_attention_bias")),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_LLAMA, "num_local_experts": 4},
        ("lm_head", "embed_tokens", "mlp.gate"),
    ),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_LLAMA, "num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12},
        ("lm_head", "embed_tokens", "mlp.gate", "mlp.shared_expert_gate"),
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_LLAMA, "head_dim": 4, "num_experts": 4, "moe_intermediate_size": 8},
        ("lm_head", "embed_tokens", "mlp.gate"),
    ),
    "granite-moe": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**_LLAMA, "num_local_experts": 4},
        ("lm_head", "embed_tokens", "router"),
    ),
}


def build(family: str) -> nn.Module:
    """The tiny model of a family, with random weights."""
    model_class, config_class, config, _ = ZOO[family]
    transformers = importlib.import_module("transformers")
    model: nn.Module = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    return model
