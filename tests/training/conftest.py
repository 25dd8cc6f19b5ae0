"""Tests of the applications: the folder's own helper modules."""

from __future__ import annotations

import sys
from pathlib import Path

# Tests are imported in importlib mode, which leaves their folder out of the path.
sys.path.append(str(Path(__file__).parent))
