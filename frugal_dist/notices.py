"""What the package says by itself: warnings that never raise, and one line of information.

Where warnings are errors, a rank that raised alone would leave the others waiting.
"""

from __future__ import annotations

import logging
import sys
import warnings


def notice(text: str) -> None:
    """``warnings.warn``, or a line on stderr where that would raise."""
    try:
        warnings.warn(text, stacklevel=3)
    except Warning:
        print(f"frugal_dist: {text}", file=sys.stderr)


def tell(text: str, aloud: bool) -> None:
    """Information for the logger "frugal_dist"; ``aloud``: on stderr, where nobody has set up logging for it."""
    logger = logging.getLogger("frugal_dist")
    if logger.isEnabledFor(logging.INFO):
        logger.info(text)
    elif aloud and logger.level == logging.NOTSET:
        print(f"frugal_dist: {text}", file=sys.stderr, flush=True)
