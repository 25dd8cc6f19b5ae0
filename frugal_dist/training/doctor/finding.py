"""What a check of the doctor finds."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, FAIL = "ok", "note", "FAIL"


@dataclass(frozen=True)
class Finding:
    """What one check found: ``verdict`` is ok, note (works, but look) or FAIL (does not work)."""

    verdict: str
    what: str
    found: str

    def line(self) -> str:
        """As the user reads it."""
        return f"{self.verdict:<5} {self.what:<26} {self.found}"
