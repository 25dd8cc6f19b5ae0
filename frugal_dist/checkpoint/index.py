"""The index of a checkpoint: what it holds, as JSON with a checksum; every value is looked at when it is read."""

from __future__ import annotations

import difflib
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from frugal_dist.checkpoint.disk import Written
from frugal_dist.checkpoint.parts import BUFFER, WEIGHT, flat_shape
from frugal_dist.config import HYPERPARAMETERS, config_from
from frugal_dist.sharding.tile import Tile
from frugal_dist.step.state import COUNTERS

T = TypeVar("T")

FORMAT = "frugal_dist checkpoint"
VERSION = 2
"""1 had no checksum of the index; it is still read."""
INDEX = "index.json"
OURS = re.compile(r"^(index\.json|rank\d{5,}\.(safetensors|extra\.pt))$")
"""Names of files in a checkpoint."""
_SEAL = re.compile(rb', "crc32": "([0-9a-f]{8})"\}\Z')
RESERVED = ("params", "param_names", "projected")
"""What stands in a parameter group beside its options."""


def tensor_file(rank: int) -> str:
    """The tensors that a rank wrote."""
    return f"rank{rank:05d}.safetensors"


def extra_file(rank: int) -> str:
    """What else a rank wrote."""
    return f"rank{rank:05d}.extra.pt"


def piece_key(name: str, area: Tile) -> str:
    """The name of a rectangle in its file."""
    return f"{name}[{area.rows[0]}:{area.rows[1]},{area.cols[0]}:{area.cols[1]}]"


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds and what must fit when it is loaded.

    identity        random; every file of the checkpoint carries it.
    ranks           how many wrote it.
    draws           fingerprint of the random selections that this torch makes.
    files           size and checksum of every file.
    tensors         the whole shape of every tensor, as two dims.
    pieces          for every tensor file its rectangles: tensor, rows, columns.
    parameters      the shape of every parameter.
    buffers         the shape of every persistent buffer of the model.
    matrices        for every projected matrix its counts and the hyperparameters its state depends on.
    regular         the same for every regular parameter.
    groups          names of the parameters of each group, and the group's hyperparameters.
    model_config    the model's own configuration, if it has one that can be written as JSON.
    """

    identity: str
    ranks: int
    draws: int
    files: dict[str, Written]
    tensors: dict[str, tuple[int, int]]
    pieces: dict[str, list[tuple[str, Tile]]]
    parameters: dict[str, list[int]]
    buffers: dict[str, list[int]]
    matrices: dict[str, dict[str, dict[str, Any]]]
    regular: dict[str, dict[str, dict[str, Any]]]
    groups: list[dict[str, Any]] = field(default_factory=list)
    model_config: dict[str, Any] | None = None

    def to_bytes(self) -> bytes:
        """The content of the index file."""
        plain = {
            **vars(self),
            "files": {name: asdict(written) for name, written in self.files.items()},
            "pieces": {
                file: [[name, *tile.rows, *tile.cols] for name, tile in pieces] for file, pieces in self.pieces.items()
            },
        }
        return sealed({"format": FORMAT, "version": VERSION, **plain})


def sealed(plain: Mapping[str, Any]) -> bytes:
    """JSON whose last entry is the checksum of all that stands before it."""
    body = json.dumps(plain, allow_nan=True).encode()[:-1]
    return body + b', "crc32": "%08x"}' % zlib.crc32(body)


class NotOurs(ValueError):
    """JSON, but not that of an index this program reads."""


def index_from(data: bytes) -> Index:
    """The index from the content of its file. ValueError saying what is wrong if it is not one, or was changed."""
    seal = _SEAL.search(data)
    if seal is not None and zlib.crc32(data[: seal.start()]) != int(seal[1], 16):
        raise ValueError("its bytes are not those that were written.")
    try:
        plain = json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply.") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise NotOurs("is not the index of a frugal_dist checkpoint.")
    version = plain.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise NotOurs(f"has version {version!r} of the format; this frugal_dist reads 1 to {VERSION}.")
    if (version > 1) is (seal is None) or (version == 1 and "crc32" in plain):
        raise ValueError("its checksum is missing, or its version is not the one that was written.")
    try:
        index = _index(plain)
        _check_whole(index)
    except KeyError as error:
        raise ValueError(f"{error} is missing.") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply.") from error
    return index


# --- looking at every value ---------------------------------------------------------------------------


def _index(plain: dict[str, Any]) -> Index:
    return Index(
        identity=_text(plain["identity"], "identity"),
        ranks=_count(plain["ranks"], "ranks"),
        draws=_count(plain["draws"], "draws"),
        files=_table(plain["files"], "files", _written),
        tensors=_table(plain["tensors"], "tensors", _two_dims),
        pieces=_table(plain["pieces"], "pieces", lambda value, where: _list(value, where, _piece)),
        parameters=_table(plain["parameters"], "parameters", lambda value, where: _list(value, where, _count)),
        buffers=_table(plain["buffers"], "buffers", lambda value, where: _list(value, where, _count)),
        matrices=_table(plain["matrices"], "matrices", lambda value, where: _entry(value, where, COUNTERS)),
        regular=_table(plain["regular"], "regular", lambda value, where: _entry(value, where, ("step",))),
        groups=_list(plain["groups"], "groups", _group),
        model_config=None if plain["model_config"] is None else _table(plain["model_config"], "model_config", _as_is),
    )


def _table(value: Any, where: str, read: Callable[[Any, str], T]) -> dict[str, T]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no table.")
    return {key: read(entry, f"{where}[{key!r}]") for key, entry in value.items()}


def _list(value: Any, where: str, read: Callable[[Any, str], T]) -> list[T]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is no list.")
    return [read(entry, f"{where}[{number}]") for number, entry in enumerate(value)]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} is {value!r}, not text.")
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{where} is {value!r}, not a count.")
    return value


def _as_is(value: Any, where: str) -> Any:
    return value


def _written(value: Any, where: str) -> Written:
    table = _table(value, where, _count)
    return Written(table["bytes"], table["crc32"])


def _two_dims(value: Any, where: str) -> tuple[int, int]:
    dims = _list(value, where, _count)
    if len(dims) != 2:
        raise ValueError(f"{where} has {len(dims)} dims, not two.")
    return dims[0], dims[1]


def _piece(value: Any, where: str) -> tuple[str, Tile]:
    name, *bounds = _list(value, where, _as_is) or [None]
    if len(bounds) != 4:
        raise ValueError(f"{where} is no rectangle.")
    top, bottom, left, right = (_count(bound, where) for bound in bounds)
    return _text(name, where), Tile((top, bottom), (left, right))


def _entry(value: Any, where: str, counters: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    entry = _table(value, where, _as_is)
    counted = _table(entry["clocks"], f"{where}['clocks']", _counter)
    missing = [name for name in counters if name not in counted]
    if missing:
        raise ValueError(f"{where} has no {missing[0]}.")
    return {"clocks": counted, "depends_on": _table(entry["depends_on"], f"{where}['depends_on']", _scalar)}


def _counter(value: Any, where: str) -> int:
    """``refreshed_at`` is -1 before the first refresh."""
    return -1 if type(value) is int and value == -1 and where.endswith("['refreshed_at']") else _count(value, where)


def _scalar(value: Any, where: str) -> Any:
    if not isinstance(value, (int, float, str)) and value is not None:
        raise ValueError(f"{where} is {value!r}, neither number nor text.")
    return value


def _group(value: Any, where: str) -> dict[str, Any]:
    group = _table(value, where, _as_is)
    options = _table(group["options"], f"{where}['options']", _option)
    _check_options(options, f"{where}['options']")
    return {"members": _list(group["members"], f"{where}['members']", _text), "options": options}


def _option(value: Any, where: str) -> Any:
    return _list(value, where, _scalar) if isinstance(value, list) else _scalar(value, where)


def _check_options(options: dict[str, Any], where: str) -> None:
    """Hyperparameters that this program would take; beside them what schedulers and users keep in a group."""
    try:
        config_from(options)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error
    lacking = [key for key in HYPERPARAMETERS if key not in options]
    for key in options.keys() - set(HYPERPARAMETERS):
        close = difflib.get_close_matches(key, lacking, n=1, cutoff=0.8)
        if key in RESERVED or close:
            raise ValueError(f"{where} has {key!r}{f' where {close[0]!r} was' if close else ''}.")


# --- whether it hangs together ------------------------------------------------------------------------


def _check_whole(index: Index) -> None:
    """Every rank's files, rectangles inside of tensors and not twice, and a tensor for every parameter and buffer."""
    want = {
        name for rank in range(min(index.ranks, len(index.files))) for name in (tensor_file(rank), extra_file(rank))
    }
    if index.files.keys() != want or len(want) != 2 * index.ranks:
        raise ValueError(f"it lists {len(index.files)} files, which are not those of {index.ranks} ranks.")
    if not index.pieces.keys() <= {tensor_file(rank) for rank in range(index.ranks)}:
        raise ValueError("it lists pieces of files that it does not list.")
    room = {name: rows * cols for name, (rows, cols) in index.tensors.items()}
    for pieces in index.pieces.values():
        for name, (rows, cols) in pieces:
            whole = index.tensors.get(name)
            if whole is None or not (rows[0] <= rows[1] <= whole[0] and cols[0] <= cols[1] <= whole[1]):
                raise ValueError(f"{piece_key(name, Tile(rows, cols))} is no part of a tensor that it lists.")
            room[name] -= (rows[1] - rows[0]) * (cols[1] - cols[0])
    twice = [name for name, left in room.items() if left < 0]
    if twice:
        raise ValueError(f"elements of {twice[0]} are in several pieces.")
    for prefix, shapes in ((WEIGHT, index.parameters), (BUFFER, index.buffers)):
        for name, shape in shapes.items():
            if 0 not in shape and index.tensors.get(prefix + name) != flat_shape(shape):
                raise ValueError(f"there is no tensor of {prefix}{name}'s shape {tuple(shape)}.")
