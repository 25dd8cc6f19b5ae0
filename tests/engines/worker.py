"""One rank of a fleet: runs the jobs that arrive on a pipe, given as a file descriptor, until the pipe closes."""

from __future__ import annotations

import faulthandler
import importlib
import logging
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any


def main() -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    pipe = Connection(int(sys.argv[1]))
    import torch

    torch.set_num_threads(1)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:
            break
        pipe.send(_run(module, name, args))
    # No clean-up of the group: the other ranks may be gone already.


def _run(module: str, name: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
    try:
        return True, getattr(importlib.import_module(module), name)(*args)
    except BaseException:
        return False, traceback.format_exc()


if __name__ == "__main__":
    main()
