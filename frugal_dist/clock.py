"""When a matrix is due for a refresh: pure functions of counts that are equal on all ranks."""

from __future__ import annotations


def offset(schedule: str, index: int, matrices: int, gap: int) -> int:
    """By how many updates a matrix refreshes after the first of the cycle; 0 for "together" (the paper)."""
    return index * gap // matrices if schedule == "staggered" else 0


def due(updates: int, refreshed_at: int, gap: int, shift: int = 0) -> bool:
    """Whether the update numbered ``updates`` (from 0) starts with a refresh. ``refreshed_at`` is -1 before the first.

    A late refresh (retry) does not shift the clock: it only has to fall into the running period.
    """
    return refreshed_at < 0 or (updates - shift) // gap > (refreshed_at - shift) // gap
