"""The portable form beside the checkpoint of somebody else's trainer, for the day it resumes on other ranks.

The trainer loads its own where that fits, bit for bit; where the layout is another, everything comes from here.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

from frugal_dist import engines
from frugal_dist.checkpoint.errors import MismatchError, together
from frugal_dist.checkpoint.files import complete_folder
from frugal_dist.checkpoint.loading import read_checkpoint
from frugal_dist.checkpoint.reader import Reader
from frugal_dist.checkpoint.savers import loaders, savers
from frugal_dist.checkpoint.unwrapping import unwrap
from frugal_dist.checkpoint.writing import write_checkpoint
from frugal_dist.engines import hooks
from frugal_dist.notices import tell
from frugal_dist.optimizer import Frugal
from frugal_dist.sharding.collectives import Ranks, gather_objects, ranks_of

FOLDER = hooks.PORTABLE
"""Its name in the trainer's folder."""
Own = dict[str, Any]
"""What is known of the trainer's own checkpoint: who saved it, and a mark of its files."""


def save_beside(folder: Path, model_or_engine: Any, optimizer: Any, extra: dict[str, Any] | None = None) -> None:
    """Save the portable form into ``folder``, in which the trainer has just saved its own. Collective.

    ``extra`` as for ``frugal_dist.checkpoint.save``. Raises CheckpointError on all ranks alike, as that does.
    """
    frugal = unwrap(optimizer)
    driver = engines.driver_of(frugal, model_or_engine)
    own = {"own": _own(folder, driver, frugal)}
    write_checkpoint(folder / FOLDER, driver, frugal, {**(extra or {}), **own}, savers(frugal, None))


def is_beside(folder: Path) -> bool:
    """Whether ``save_beside`` was the last to save to ``folder``, after the trainer. Collective, of all ranks."""
    ranks = ranks_of("auto")
    then = _agreed(ranks, folder / FOLDER)
    return then is not None and then["mark"] == _agreed_mark(ranks, folder)


def stands_in(folder: Path, model_or_engine: Any, optimizer: Any) -> bool:
    """Whether to load the portable form: the trainer's own is of another layout, or not whole. Collective.

    Args:
        folder: the trainer's checkpoint.
        model_or_engine: as for ``frugal_dist.checkpoint.load``.
        optimizer: a Frugal or a wrapper around one.

    Raises:
        CheckpointError: (a ValueError) on all ranks alike, where it is needed, but not all see it, or the trainer has
            saved to ``folder`` since.
    """
    frugal, ranks = unwrap(optimizer), ranks_of(engines.group_of(model_or_engine))
    then = _agreed(ranks, folder / FOLDER)
    if then is None:
        return False
    now = _own(folder, model_or_engine, frugal)
    if then["layout"] == now["layout"] and not engines.keeps_rank_zero_only(frugal):
        return False
    if then["mark"] != now["mark"]:
        raise MismatchError(
            f"{folder} was saved by {then['layout']}, then again, or changed, without {FOLDER}, which is of the first "
            "time. Resume with the ranks and the engine of the second time, or load that folder with "
            "frugal_dist.checkpoint."
        )
    return True


def load_beside(folder: Path, model_or_engine: Any, optimizer: Any) -> dict[str, Any]:
    """Load what ``save_beside`` wrote, but generators, which are the trainer's; returns its ``extra``. Collective.

    Raises CheckpointError on all ranks alike, as ``frugal_dist.checkpoint.load``.
    """
    frugal = unwrap(optimizer)
    ranks, place = loaders(frugal, None), folder / FOLDER
    extra = read_checkpoint(place, model_or_engine, frugal, "error", verify=True, rng=False, ranks=ranks)
    then, now = extra["own"]["layout"], _layout(model_or_engine, frugal)
    if ranks.rank == 0:
        words = _in_words(then) if then == now else f"{_in_words(then)}, now {_in_words(now)}"
        tell(f"resumed {folder} from its portable copy ({place}), saved by {words}", aloud=True)
    return extra


def _saved(place: Path) -> Own | None:
    """What is known of the own checkpoint beside which ``place`` was saved; None if it was not."""
    if not complete_folder(place).is_dir():
        return None
    own: Own | None = Reader(place).record(0)[0]["extra"].get("own")
    return own


def _agreed(ranks: Ranks, place: Path) -> Own | None:
    everyone = gather_objects(ranks, together(ranks, lambda: _saved(place)))
    if any(other != everyone[0] for other in everyone):
        raise MismatchError(f"The ranks see different things at {place}: they must share the folder.")
    own: Own | None = everyone[0]
    return own


def _own(folder: Path, driver: Any, frugal: Frugal) -> Own:
    """Collective."""
    return {
        "layout": _layout(driver, frugal),
        "mark": _agreed_mark(ranks_of(engines.group_of(driver)), folder),
    }


def _layout(driver: Any, frugal: Frugal) -> str:
    return f"{engines.layout_of(driver, frugal)} on {ranks_of(engines.group_of(driver)).size} ranks"


def _in_words(layout: str) -> str:
    return re.sub(r"\bon 1 ranks$", "on 1 rank", layout)


def _agreed_mark(ranks: Ranks, folder: Path) -> int:
    """Rank 0's: others may not see yet what it has just written."""
    mark: int = gather_objects(ranks, together(ranks, lambda: _mark(folder) if ranks.rank == 0 else 0))[0]
    return mark


TAIL = 2**16


def _mark(folder: Path) -> int:
    """Of what rank 0 wrote into the trainer's own checkpoint, 0 if nothing.

    The end of a file that torch has saved has the checksums of all of it.
    """
    checksum = 0
    for path in sorted(path for path in folder.rglob("*") if engines.is_written_by_rank_zero(path.name)):
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL, 0))
            checksum = zlib.crc32(file.read(), checksum)
    return checksum
