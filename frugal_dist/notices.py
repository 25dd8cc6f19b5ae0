"""Warnings that never raise: where warnings are errors, a rank that raised alone would leave the others waiting."""

from __future__ import annotations

import sys
import warnings


def notice(text: str) -> None:
    """``warnings.warn``, or a line on stderr where that would raise."""
    try:
        warnings.warn(text, stacklevel=3)
    except Warning:
        print(f"frugal_dist: {text}", file=sys.stderr)
