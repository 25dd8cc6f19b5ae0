"""What all unit tests share: the folder's own helper modules, and hypothesis without chance in CI."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import settings

# Tests are imported in importlib mode, which leaves their folder out of the path.
sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("local", deadline=None, max_examples=50)
settings.load_profile("ci" if os.environ.get("CI") else "local")
