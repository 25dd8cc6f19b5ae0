"""Recipes: what to train, on what, with which optimizer and engine. Typed YAML; the command line sets any key.

A recipe is a shipped name (``llama_60m``) or a YAML file; ``--optimizer.lr 2e-3`` or ``--steps 100`` after it change
single keys. Unknown keys and values of the wrong type are errors that name the key.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from glob import glob
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from frugal_dist.presets import NAMED
from frugal_dist.training.data.local_or_hub import nearby
from frugal_dist.training.recipe.declared import Recipe, Run
from frugal_dist.training.recipe.spelling import (
    OPTIONS,
    ZERO,
    Keys,
    check_keys_of,
    fitted_file,
    is_key,
    keys_of,
    read_changes,
    value_for,
)

R = TypeVar("R", bound=Run)


COMMANDS = {"recipes": "pretrain, compare or plan", "recipes/finetune": "finetune"}
"""What takes the recipes that come with the package, by their folder."""


def shipped(kind: type[Run] = Recipe) -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return _shipped(kind.SHIPPED)


def _shipped(folder: str) -> dict[str, Path]:
    place = Path(str(resources.files("frugal_dist.training"))) / folder
    return {path.stem: path for path in sorted(place.glob("*.yaml"))}


def read_recipe(
    name: str,
    changes: Sequence[str] = (),
    kind: type[R] = Recipe,  # type: ignore[assignment]
) -> R:
    """The recipe of this name or file with ``--key value`` changes; ``--help`` among them prints all keys and exits.

    Raises ValueError that names the key and what is allowed.
    """
    path, keys = _path_of(name, kind), keys_of(kind)
    try:
        values = _read_section(path, keys)
        stage = _settle_short_names(values)
    except ValueError as error:
        raise ValueError(f"recipe {name}: {error}") from error
    if {"--help", "-h"} & set(changes):
        parser = recipe_parser(kind, f"frugal-dist {COMMANDS[kind.SHIPPED].partition(',')[0]} {name}")
        parser.set_defaults(_flat(values, keys))
        parser.parse_args(["--help"])
    return _made(kind, f"recipe {name}", values, changes, stage, path)


def recipe_of(record: Mapping[str, Any], changes: Sequence[str] = (), kind: type[R] = Recipe) -> R:  # type: ignore[assignment]
    """The recipe that a run noted in its metrics, with changes as ``read_recipe`` takes them."""
    keys = keys_of(kind)
    values = copy.deepcopy({key: value for key, value in record.items() if key in keys})
    return _made(kind, "the run's recipe", values, changes, None, Path())


def _made(
    kind: type[R], named: str, values: dict[str, Any], changes: Sequence[str], stage: int | None, path: Path
) -> R:
    """Values with changes, as a recipe. ``stage``: of an engine named by it; ``path``: beside which files lie."""
    keys, parser = keys_of(kind), recipe_parser(kind)
    for key, text in read_changes(changes, keys):
        if key == "engine":
            stage = ZERO.get(text)
        _change(values, key, text, keys)
    try:
        checked = parser.instantiate(parser.parse_object(values))
    except Exception as error:  # the library has several kinds of errors
        raise ValueError(f"{named}: {_explained(str(error))}") from error
    typed = {one.name: getattr(checked, one.name) for one in fields(kind)}
    typed = {**_beside(path, typed), "folder": os.path.expanduser(typed["folder"])}
    typed["deepspeed"] = _staged(typed["deepspeed"], stage)
    return kind(**typed)


def _read_section(path: Path, keys: Keys, above: str = "") -> dict[str, Any]:
    """The values of a file, checked for keys that there are not; a section in it may be a file of its own."""
    from frugal_dist.training.recipe.yaml_file import read_yaml

    values = read_yaml(path)
    check_keys_of(values, keys, above)
    for name, value in values.items():
        if is_dataclass(keys.get(f"{above}{name}")) and isinstance(value, str):
            values[name] = _read_section(Path(value), keys, f"{above}{name}.")
    return fitted_file(values, keys, above)


def _settle_short_names(values: dict[str, Any]) -> int | None:
    """An optimizer "frugal-columns" becomes "frugal" and its projection, an engine "zero3" "deepspeed"; its stage."""
    optimizer = values.get("optimizer") or {}
    if optimizer.get("name") in NAMED:
        short, options = optimizer["name"], optimizer.get("options") or {}
        for key, value in NAMED[short][1].items():
            if options.get(key, value) != value:
                raise ValueError(f"optimizer.name is {short!r}, but {OPTIONS}.{key} is {options[key]!r}.")
        _put(values, "optimizer.name", short)
    if values.get("engine") not in ZERO:
        return None
    stage = ZERO[values["engine"]]
    _put(values, "engine", values["engine"])
    return stage


def _change(values: dict[str, Any], key: str, text: str, keys: Keys) -> None:
    """What a command line says of one key: a value, with "+" one more of a list, or a section as a file or {...}."""
    name = key.removesuffix("+")
    value = value_for(name, text, keys)
    if is_dataclass(keys.get(name)):
        if isinstance(value, dict):
            check_keys_of(value, keys, f"{name}.")
        else:
            value = _read_section(Path(value), keys, f"{name}.")
        value = {**values.get(name, {}), **value}
    if key != name:
        before = _flat(values, keys).get(name) or []
        value = [*before, *(value if isinstance(value, list) else [value])]
    _put(values, name, value)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a key by its whole name; a short name as what it stands for."""
    if key == "optimizer.name" and value in NAMED:
        value, fixed = NAMED[value]
        for option, one in fixed.items():
            _put(values, f"{OPTIONS}.{option}", one)
    if key == "engine" and value in ZERO:
        value = "deepspeed"
    *sections, leaf = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[leaf] = value


def as_yaml(recipe: Run) -> str:
    """A recipe with all its keys, as a file; sections first."""
    import yaml

    values = dict(sorted(recipe.record().items(), key=lambda item: not isinstance(item[1], dict)))
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def list_recipes() -> str:
    """The shipped recipes, by the commands that take them, with what each says of itself."""
    lines = []
    for folder, commands in COMMANDS.items():
        lines += [f"for frugal-dist {commands}:"]
        for name, path in _shipped(folder).items():
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            lines.append(f"  {name:<20} {first.lstrip('# ')}")
    return "\n".join(lines)


def copy_recipe(name: str, out: Path | None = None) -> tuple[list[Path], str]:
    """Copy a shipped recipe, and the DeepSpeed JSON that it names: the files, and a command that takes the recipe.

    ``out``: a file or an existing folder; None is NAME.yaml here. ValueError for a name that is not shipped, and for
    files that are there already or cannot be written.
    """
    from frugal_dist.training.recipe.yaml_file import read_yaml

    shipped = {one: (path, folder) for folder in COMMANDS for one, path in _shipped(folder).items()}
    if name not in shipped:
        close = difflib.get_close_matches(name, shipped, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"there is no shipped recipe {name!r}; choose one of {', '.join(shipped)}.{hint}")
    source, folder = shipped[name]
    out = Path(f"{name}.yaml") if out is None else out / f"{name}.yaml" if out.is_dir() else out
    json_file = read_yaml(source).get("deepspeed")
    files = {out: source} | ({out.parent / json_file: source.parent / json_file} if json_file else {})
    for target in files:
        if target.exists():
            raise ValueError(f"{target} exists already; name another file.")
    for target, origin in files.items():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(origin.read_bytes())
        except OSError as error:
            raise ValueError(f"{target} cannot be written: {error.strerror}.") from error
    return list(files), f"frugal-dist {COMMANDS[folder].partition(',')[0]} {out}"


def kind_of(name: str, kinds: Sequence[type[Run]]) -> type[Run]:
    """Whose keys a recipe has: a shipped one by its folder, a file by what stands in it; the first kind if in doubt."""
    from frugal_dist.training.recipe.yaml_file import read_yaml

    for kind in kinds:
        if name in shipped(kind):
            return kind
    if not Path(name).is_file():
        return kinds[0]
    names = list(_names(read_yaml(Path(name))))
    return min(kinds, key=lambda kind: sum(not is_key(one, keys_of(kind)) for one in names))


def _names(values: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{above}{name}"
        if isinstance(value, dict):
            yield from _names(value, f"{above}{name}.")


def _staged(named: str | None, stage: int | None) -> str | None:
    """The DeepSpeed JSON; where the engine is named by its stage and there is none, "zeroN".

    Raises ValueError for a JSON of another stage.
    """
    if stage is None or named is None:
        return named if stage is None else f"zero{stage}"
    try:
        own = json.loads(Path(named).read_text(encoding="utf-8"))["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return named  # who reads it for training says what is wrong with it
    if own != stage:
        raise ValueError(
            f"engine is 'zero{stage}', but {named} says stage {own}. Set engine: deepspeed, or change one."
        )
    return named


def _flat(values: dict[str, Any], keys: Keys, above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        section = isinstance(value, dict) and is_dataclass(keys.get(f"{above}{name}"))
        flat |= _flat(value, keys, f"{above}{name}.") if section else {f"{above}{name}": value}
    return flat


def _beside(recipe: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Paths as they are named or, where nothing is there, beside the recipe: it then works from any folder."""
    return {
        key: replace(value, **_beside(recipe, {one.name: getattr(value, one.name) for one in fields(value)}))
        if is_dataclass(value) and not isinstance(value, type)
        else _near(recipe.parent, value)
        if key in _PATHS and isinstance(value, str)
        else value
        for key, value in values.items()
    }


_PATHS = ("deepspeed", "path", "tokenizer", "validation_path", "source", "train", "validation")
"""Keys, in whatever section, that name files, folders or patterns of them."""


def _near(folder: Path, name: str) -> str:
    if not name:
        return name  # nothing is named; the folder itself is not meant
    given = os.path.expanduser(name)
    beside = str(folder / given)
    return beside if not _is_there(given) and _is_there(beside) else given


def _is_there(name: str) -> bool:
    return bool(name) and (Path(name).exists() or bool(glob(name, recursive=True)))


def recipe_parser(kind: type[Any], command: str = "frugal-dist ... RECIPE") -> Any:
    """Checks a recipe's types, and prints its keys: one option per key."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=command, exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False)
    return parser


def _path_of(name: str, kind: type[Any]) -> Path:
    known = shipped(kind)
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_file():
        return path
    close = difflib.get_close_matches(name, known, n=1)
    file = next((f"{name}{ending}" for ending in (".yaml", ".yml") if Path(f"{name}{ending}").is_file()), "")
    hint = f" Did you mean {(file or close[0])!r}?" if file or close else nearby(name)
    if path.is_dir():
        hint = " It is a folder, a recipe is a YAML file; the folder of a model is named by --model.path."
    for folder, commands in COMMANDS.items():
        if name in _shipped(folder):
            hint = f" That one is for frugal-dist {commands}."
    raise ValueError(f"there is no recipe {name!r}: neither a file nor one of {', '.join(known)}.{hint}")


def _explained(message: str) -> str:
    """The library's words, shorter."""
    text = " ".join(message.split())
    text = re.sub(r"a typing\.Literal\[([^\]]*)\]", r"one of \1", text)
    text = re.sub(r"(?:a )?<class '(\w+)'>", r"\1", text).replace("NoneType", "null")
    union = r"Does not validate against any of the Union subtypes Subtypes: \[(.*)\] Errors: .* Given value: "
    text = re.sub(union, lambda kinds: f"Expected {kinds.group(1).replace(', ', ' or ')}. Got value: ", text)
    return re.sub(r'Parser key "([\w.]+)": ', r"\1: ", text).rstrip(".") + "."
