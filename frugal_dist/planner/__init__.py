"""Bytes and collectives per rank for a model, an engine and a number of ranks: without a GPU, without the ranks."""

from __future__ import annotations

from frugal_dist.planner.formula import (
    BASIS_BYTES,
    GIB,
    LLAMA_SHAPES,
    MOMENT_BYTES,
    LlamaShape,
    Weight,
    adamw_bytes,
    frugal_bytes,
    llama_weights,
    memory_table,
)

__all__ = [
    "BASIS_BYTES",
    "GIB",
    "LLAMA_SHAPES",
    "MOMENT_BYTES",
    "LlamaShape",
    "Weight",
    "adamw_bytes",
    "frugal_bytes",
    "llama_weights",
    "memory_table",
]
