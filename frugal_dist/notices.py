"""What the package says by itself: warnings and one line of information, which never raise.

Where warnings are errors, or a rank's terminal is gone, a rank that raised alone would leave the others waiting.
"""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import suppress


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
    with suppress(OSError, ValueError):  # closed, or nobody reads it any more
        print(f"frugal_dist: {text}", file=sys.stderr, flush=True)
