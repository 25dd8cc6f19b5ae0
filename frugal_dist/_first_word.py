"""Imported before torch: a training says within a second that it has begun, as torch alone may take many to load."""

from __future__ import annotations

import os
import sys
from itertools import pairwise

COMMANDS = ("pretrain", "finetune", "compare", "plan", "doctor", "export")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def _command() -> str:
    """Of this process, if it is `frugal-dist COMMAND` or `python -m frugal_dist.cli COMMAND`; else nothing."""
    words = sys.orig_argv
    for before, word in pairwise(words):
        if os.path.basename(before) in ("frugal-dist", "frugal_dist.cli") and word in COMMANDS:
            return word
    return ""


def _is_first() -> bool:
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


if _command() and _is_first() and not {"-h", "--help", "--quick"} & set(sys.orig_argv):
    print(f"frugal-dist {_command()}: loading PyTorch ...", file=sys.stderr, flush=True)
