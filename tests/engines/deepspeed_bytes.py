"""Jobs that count optimizer state with the functions of benchmarks/state_bytes.py."""

from __future__ import annotations

import sys

import deepspeed_cases as cases
from fleet import ROOT


def counted(stage: int, optimizer: str) -> int:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from state_bytes import state_bytes

    return state_bytes(cases.small_llama(), stage, optimizer)
