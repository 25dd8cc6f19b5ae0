"""Whether this machine has GPUs, also where the tests hide them from torch."""

from __future__ import annotations

import shutil
import subprocess

SMI = shutil.which("nvidia-smi")
GPUS = SMI is not None and "GPU" in subprocess.run([SMI, "-L"], capture_output=True, text=True, check=False).stdout
