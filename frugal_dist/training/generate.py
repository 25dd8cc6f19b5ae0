"""`frugal-dist generate`: what a model goes on with after a prompt, by transformers' own ``generate``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from frugal_dist.training.exported_model import open_model
from frugal_dist.training.models import check_positions


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    ``tokens``: how many new ones at most. ``temperature``: 0 takes the likeliest token every time. ``top_k``: among so
    many of the likeliest, 0 among all; ``top_p``: among the likeliest that together have this probability. ``seed``:
    None draws differently every time. ``samples``: how many texts.
    """

    tokens: int = 100
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None
    samples: int = 1

    def check(self) -> None:
        """ValueError, naming the option."""
        for key in ("tokens", "samples"):
            if getattr(self, key) < 1:
                raise ValueError(f"--{key} is {getattr(self, key)}; it must be at least 1.")
        if self.temperature < 0:
            raise ValueError(f"--temperature is {self.temperature:g}; it must not be negative, 0 draws nothing.")
        if self.top_k < 0:
            raise ValueError(f"--top-k is {self.top_k}; it must not be negative, 0 takes all tokens.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p:g}; it must be above 0 and at most 1.")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"--samples is {self.samples}, but --temperature 0 gives the same text every time.")

    def options(self) -> dict[str, Any]:
        """For ``generate`` of transformers."""
        common = {"max_new_tokens": self.tokens, "num_return_sequences": self.samples}
        if self.temperature == 0:
            return {**common, "do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        return {**common, "do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def generate(model: Path, prompt: str, sampling: Sampling, tokenizer: Path | None = None) -> list[str]:
    """Texts that begin with the prompt. ``model``: a run, a checkpoint, or a model folder, such as an export.

    The prompt is divided into tokens as training text is, without special ones; an empty one begins a document. Raises
    ValueError for a model that writes no text, has no tokenizer, or no positions for so many tokens.
    """
    sampling.check()
    restored = open_model(model, tokenizer)
    writer: Any = restored.model
    if not writer.can_generate():
        raise ValueError(f"{model} is a {type(writer).__name__}, which writes no text.")
    words = restored.tokenizer
    if words is None:
        why = f": {restored.trouble}" if restored.trouble else "."
        raise ValueError(f"{restored.source} has no tokenizer; name one with --tokenizer DIR{why}")
    end = words.eos_token_id
    ids = words(prompt, add_special_tokens=False)["input_ids"] or ([] if end is None else [end])
    if not ids:
        raise ValueError("the prompt is empty, and the tokenizer has no token that begins a document: give a --prompt.")
    if note := check_positions(writer, len(ids) + sampling.tokens, "--tokens"):
        print(note, file=sys.stderr)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    writer = writer.to(device).eval()
    start = torch.tensor([ids], device=device)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    with torch.inference_mode():
        rows = writer.generate(start, attention_mask=torch.ones_like(start), pad_token_id=end, **sampling.options())
    return [str(words.decode(row, skip_special_tokens=True)) for row in rows]
