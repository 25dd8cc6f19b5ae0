"""Names that mean something local or something on the Hugging Face hub: told apart before anything is fetched."""

from __future__ import annotations

import difflib
import os
import re
import sys
from pathlib import Path

OFFLINE = (
    "Where there is no network: fetch it on a machine that has one (`hf download`), then name the local folder, or set "
    "HF_HOME to the cache with it"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_ENDINGS = (
    *(
        ".json",
        ".jsonl",
        ".txt",
        ".parquet",
        ".csv",
        ".tsv",
        ".yaml",
        ".yml",
        ".bin",
        ".safetensors",
        ".model",
        ".arrow",
    ),
    *(".gz", ".zst", ".bz2", ".xz", ".zip"),
)
_PATIENCE = 5.0
"""Seconds in which the hub must answer at all."""


def settle_source(name: str, key: str) -> None:
    """Before something is read that may be local or on the hub; returns at once for what is there.

    Raises ValueError, naming the ``key``, for what can only be a path and is not there. Where the hub does not answer,
    the libraries are told to look into their cache only: each of them would try again for a minute.
    """
    if Path(name).exists():
        return
    if looks_local(name):
        raise ValueError(f"{key} is {name!r}: there is no such file or folder.{nearby(name)}")
    _settle_network()


def looks_local(name: str) -> bool:
    """Whether this can only be a path: names on the hub are NAME or OWNER/NAME and have no file ending."""
    return not _HUB_NAME.fullmatch(name) or name.lower().endswith(_FILE_ENDINGS)


def nearby(name: str) -> str:
    """What lies in the same folder under nearly this name, as a sentence after a blank; "" if nothing does."""
    path = Path(name)
    try:
        close = difflib.get_close_matches(path.name, sorted(one.name for one in path.parent.iterdir()), n=1)
    except OSError:  # the folder is not there, either
        return "" if path.parent in (path, Path()) else f" Nor is {str(path.parent)!r}."
    return f" Did you mean {str(path.parent / close[0])!r}?" if close else ""


def _settle_network() -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        return
    print(f"{constants.ENDPOINT} does not answer: only what is in the local cache can be used.", file=sys.stderr)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later, and processes
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def _answers(endpoint: str) -> bool:
    """Any answer counts, also through a proxy, also an error: the hub's library knows better what it means."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=_PATIENCE)
    except Exception:  # of whichever library sends requests
        return False
    return True
