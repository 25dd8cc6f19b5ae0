"""What the package says by itself: warnings and one line of information, which never raise.

Where warnings are errors, or a rank's terminal is gone, a rank that raised alone would leave the others waiting.

The package imports this before torch, and nothing here imports torch: a training says within a second that it has
begun, as torch alone may take many to load.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from contextlib import suppress
from itertools import pairwise
from types import FrameType

COMMANDS = ("pretrain", "finetune", "compare", "plan", "doctor", "export", "evaluate", "generate")
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


def notice(text: str) -> None:
    """``warnings.warn``, or a line on stderr where that would raise."""
    try:
        warnings.warn(text, stacklevel=3)
    except Warning:
        _print(text)


def tell(text: str, aloud: bool) -> None:
    """Information for the logger "frugal_dist"; ``aloud``: on stderr, where nobody has set up logging for it."""
    logger = logging.getLogger("frugal_dist")
    if logger.isEnabledFor(logging.INFO):
        logger.info(text)
    elif aloud and logger.level == logging.NOTSET:
        _print(text)


def _print(text: str) -> None:
    line, bars = f"frugal_dist: {text}", sys.modules.get("tqdm.std")
    with suppress(OSError, ValueError):  # closed, or nobody reads it any more
        if bars is None:
            print(line, file=sys.stderr, flush=True)
        else:  # takes its progress bars away, and draws them again below
            bars.tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()


def _command() -> str:
    """Of this process, if it is `frugal-dist COMMAND` or `python -m frugal_dist.cli COMMAND`; else nothing."""
    words = sys.orig_argv
    for before, word in pairwise(words):
        if os.path.basename(before) in ("frugal-dist", "frugal_dist.cli") and word in COMMANDS:
            return word
    return ""


def _is_first() -> bool:
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


def _stopped(number: int, frame: FrameType | None) -> None:
    """Ctrl-C while modules are loaded: a sentence, not the place in torch where that was."""
    os.write(2, b"\nStopped before it began (SIGINT); the same command starts it.\n" if _is_first() else b"")
    os._exit(130)


def hear_again() -> None:
    """All is loaded: Ctrl-C is KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stopped:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stopped)
if _command() and _is_first() and not {"-h", "--help", "--quick"} & set(sys.orig_argv):
    print(f"frugal-dist {_command()}: loading PyTorch ...", file=sys.stderr, flush=True)
