"""Ways to damage a checkpoint at random. Each draws nothing but from the generator it is given."""

from __future__ import annotations

import json
import os
import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frugal_dist.checkpoint.index import INDEX, sealed

Damage = Callable[[random.Random, Path, Path], None]
"""``damage(draw, folder, other)``: ``other`` is a sound checkpoint of the same run at another step."""


def a_file(draw: random.Random, folder: Path, suffix: str = "") -> Path:
    return draw.choice(sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(suffix)))


def flip_bits(draw: random.Random, folder: Path, other: Path) -> None:
    path = a_file(draw, folder)
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def flip_a_bit_of_the_index(draw: random.Random, folder: Path, other: Path) -> None:
    data = bytearray((folder / INDEX).read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    (folder / INDEX).write_bytes(data)


def another_character_of_the_index(draw: random.Random, folder: Path, other: Path) -> None:
    text = (folder / INDEX).read_text()
    at = draw.randrange(len(text))
    (folder / INDEX).write_text(text[:at] + draw.choice(string.printable) + text[at + 1 :])


def cut_off_or_lengthened(draw: random.Random, folder: Path, other: Path) -> None:
    path = a_file(draw, folder)
    size = path.stat().st_size
    os.truncate(path, draw.choice((0, size - 1, size + 1, draw.randrange(size), size + draw.randrange(5000))))


def zeros_in_the_middle(draw: random.Random, folder: Path, other: Path) -> None:
    """As after a crash of a file system."""
    path = a_file(draw, folder)
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    stop = min(len(data), start + draw.choice((16, 512, 4096)))
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


def something_else_in_its_place(draw: random.Random, folder: Path, other: Path) -> None:
    path = a_file(draw, folder)
    path.unlink()
    how = draw.choice(("missing", "folder", "pipe", "link to itself", "link to nothing", "link to a folder", "empty"))
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how.startswith("link"):
        path.symlink_to({"itself": path, "nothing": folder / "nothing", "a folder": folder}[how.split(" to ")[1]])
    elif how == "empty":
        path.write_bytes(b"")


def a_file_of_the_other(draw: random.Random, folder: Path, other: Path) -> None:
    for _ in range(draw.choice((1, 1, 2, 3))):
        path = a_file(draw, other)
        shutil.copy(path, folder / path.name)


def files_change_places(draw: random.Random, folder: Path, other: Path) -> None:
    suffix = draw.choice((".safetensors", ".pt", ""))
    one, two = a_file(draw, folder, suffix), a_file(draw, folder, suffix)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def one_file_in_the_place_of_another(draw: random.Random, folder: Path, other: Path) -> None:
    one, two = a_file(draw, folder), a_file(draw, folder)
    if one != two:
        shutil.copy(one, two)


def files_that_do_not_belong(draw: random.Random, folder: Path, other: Path) -> None:
    """Harmless."""
    path = a_file(draw, folder)
    shutil.copy(path, folder / draw.choice(("rank00007.safetensors", "rank00007.extra.pt", f"{path.name}~", ".nfs01")))


def a_value_of_the_index(draw: random.Random, folder: Path, other: Path) -> None:
    """By a program that knows nothing of the checksum."""
    plain = json.loads((folder / INDEX).read_text())
    edit(draw, plain)
    (folder / INDEX).write_text(json.dumps(plain))


def a_value_of_a_header(draw: random.Random, folder: Path, other: Path) -> None:
    path = a_file(draw, folder, ".safetensors")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    plain = json.loads(data[8 : 8 + length])
    edit(draw, plain)
    text = json.dumps(plain, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


SEEN: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (
        flip_bits,
        flip_a_bit_of_the_index,
        another_character_of_the_index,
        cut_off_or_lengthened,
        zeros_in_the_middle,
        something_else_in_its_place,
        a_file_of_the_other,
        files_change_places,
        one_file_in_the_place_of_another,
        files_that_do_not_belong,
        a_value_of_the_index,
        a_value_of_a_header,
    )
}
"""What must be seen wherever it changes what is loaded."""


def a_sealed_value(draw: random.Random, folder: Path, other: Path) -> None:
    """With a right checksum: a faulty writer."""
    plain = json.loads((folder / INDEX).read_text())
    for _ in range(draw.choice((1, 1, 1, 3))):
        edit(draw, plain)
    plain.pop("crc32", None)
    (folder / INDEX).write_bytes(sealed(plain))


def a_value_without_checksum(draw: random.Random, folder: Path, other: Path) -> None:
    """In a checkpoint of the first format."""
    plain = {**json.loads((folder / INDEX).read_text()), "version": 1}
    del plain["crc32"]
    edit(draw, plain)
    (folder / INDEX).write_text(json.dumps(plain))


UNSEEN: dict[str, Damage] = {damage.__name__: damage for damage in (a_sealed_value, a_value_without_checksum)}
"""What nobody can always tell from a sound checkpoint: it may be loaded, but it must not fail half-way."""


# --- values -----------------------------------------------------------------------------------------------


def edit(draw: random.Random, plain: dict[str, Any]) -> None:
    """Change one thing somewhere in JSON: deeper places are as likely as there are more of them."""
    places = list(_places(plain))
    container, key = draw.choice(places)
    how = draw.choice(("change", "change", "change", "type", "drop", "double", "rename", "swap"))
    if how == "drop":
        del container[key]
    elif how == "double" and isinstance(container, list):
        container.insert(key, container[key])
    elif how == "rename" and isinstance(container, dict):
        container[_changed_text(draw, key)] = container.pop(key)
    elif how == "swap":
        there, its = draw.choice(places)
        if not _inside(container[key], there) and not _inside(there[its], container):
            container[key], there[its] = there[its], container[key]
    elif how == "type":
        container[key] = draw.choice(OTHER_TYPES)
    else:
        container[key] = _changed(draw, container[key])


OTHER_TYPES: tuple[Any, ...] = (
    None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", "text", [], [1], {}, {"a": 1}, [[[]]]
)  # fmt: skip


def _places(value: Any) -> Any:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield value, key
        yield from _places(inner)


def _inside(outer: Any, container: Any) -> bool:
    return outer is container or any(inner is container for one, key in _places(outer) for inner in (one[key],))


def _changed(draw: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return draw.choice((value + 1, value - 1, -value, value * 2, value ^ (1 << draw.randrange(8)), 10**9))
    if isinstance(value, float):
        return draw.choice((value + 1, -value, value * 10, 0.0))
    if isinstance(value, str):
        return _changed_text(draw, value)
    if isinstance(value, list):
        return draw.choice((value[:-1], value + value, list(reversed(value))))
    return dict(list(value.items())[1:])


def _changed_text(draw: random.Random, text: str) -> str:
    at = draw.randrange(len(text) + 1)
    return draw.choice((text[:at] + chr(draw.randrange(97, 123)) + text[at + 1 :], text[:at], text + "x"))
