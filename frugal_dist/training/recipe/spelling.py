"""Keys and values of a recipe as people write them: what they mean, and what was meant by a word that is no key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from frugal_dist.config import HYPERPARAMETERS
from frugal_dist.presets import NAMED

Keys = Mapping[str, Any]
"""Every key of a recipe by its whole name, sections included, and its type."""

OPTIONS = "optimizer.options"
ZERO = {f"zero{stage}": stage for stage in range(4)}
"""Names of engines: DeepSpeed's, at this stage."""
_ELSEWHERE = {
    "learning_rate": "optimizer.lr", "wd": "optimizer.weight_decay", "optim": "optimizer.name",
    "rho": f"{OPTIONS}.density", "update_proj_gap": f"{OPTIONS}.update_gap",
    "t": f"{OPTIONS}.update_gap", "max_steps": "steps", "num_steps": "steps", "num_train_epochs": "data.epochs",
    "batch_size": "batch", "total_batch_size": "batch", "per_device_train_batch_size": "micro_batch",
    "micro_batch_size": "micro_batch", "max_length": "length", "seq_len": "length", "sequence_length": "length",
    "out": "folder", "output_dir": "folder", "save_dir": "folder", "warmup_steps": "schedule.warmup",
    "scheduler": "schedule.name", "grad_clipping": "clip", "max_grad_norm": "clip", "dtype": "precision",
    "bf16": "precision", "fp16": "precision", "save_every": "saving.every", "save_steps": "saving.every",
    "eval_every": "evaluate_every", "eval_steps": "evaluate_every", "logging_steps": "log_every",
    "gradient_checkpointing": "model.checkpointing", "dataset": "data.path", "report_to": "trackers",
}  # fmt: skip
"""What other programs call a key."""
_NO_KEYS = {
    "device": "Training runs on the GPU that the launcher gives a process, on the CPU where there is none; "
    "CUDA_VISIBLE_DEVICES chooses, empty for the CPU.",
    "gpus": "The launcher decides: torchrun --nproc-per-node, RANKS of the scripts in launch/.",
    "ranks": "The launcher decides: torchrun --nproc-per-node, RANKS of the scripts in launch/.",
    "rank": f"Set {OPTIONS}.density, a share: rank / hidden size.",
    "resume": "The same command resumes the run in the folder; for another run, name another --folder.",
    "gradient_accumulation_steps": "It follows from batch, micro_batch and the number of ranks: set micro_batch.",
}


def keys_of(kind: type[Any], above: str = "") -> dict[str, Any]:
    """The keys of a kind of recipe."""
    keys: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for one in fields(kind):
        name = f"{above}{one.name}"
        keys[name] = hints[one.name]
        if is_dataclass(hints[one.name]):
            keys |= keys_of(hints[one.name], f"{name}.")
    return keys


def is_key(name: str, keys: Keys) -> bool:
    """Whether a recipe has it; an option of the optimizer, of whatever name, is checked by the optimizer."""
    return name in keys or name.startswith(f"{OPTIONS}.")


def meant(name: str, keys: Keys) -> str:
    """A sentence, after a blank, that says which key may be meant by a name that is none; "" if nobody knows."""
    plain = name.strip("-").replace("-", "_").lower()
    leaf = plain.rpartition(".")[2]
    if plain in keys:
        return f" Did you mean {plain!r}?"
    there = [key for key in keys if key.rpartition(".")[2] == leaf and not is_dataclass(keys[key])]
    if not there and leaf in _NO_KEYS:
        return f" {_NO_KEYS[leaf]}"
    if not there and leaf in HYPERPARAMETERS and OPTIONS in keys:
        there = [f"{OPTIONS}.{leaf}"]
    if not there and _ELSEWHERE.get(leaf):
        there = [key for key in (_ELSEWHERE[leaf], _ELSEWHERE[leaf].partition(".")[2]) if is_key(key, keys)][:1]
    if not there:
        leaves = {key.rpartition(".")[2]: key for key in reversed(list(keys))}
        leaves |= {key: f"{OPTIONS}.{key}" for key in HYPERPARAMETERS if key not in leaves}
        close = difflib.get_close_matches(plain, keys, n=1, cutoff=0.8)
        there = close or [leaves[one] for one in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)]
    return f" Did you mean {' or '.join(map(repr, there))}?" if there else ""


def check_keys_of(values: Mapping[str, Any], keys: Keys, above: str = "") -> None:
    """ValueError for a key of a file that a recipe does not have, with the one that is meant."""
    for name, value in values.items():
        whole = f"{above}{name}"
        if not is_key(whole, keys):
            section = f" in {above.rstrip('.')!r}" if above else ""
            raise ValueError(f"there is no key {str(name)!r}{section}.{meant(whole, keys)}")
        if not is_dataclass(keys.get(whole)):
            continue
        if isinstance(value, dict):
            check_keys_of(value, keys, f"{whole}.")
        elif not _is_file(value):
            raise ValueError(_no_section(whole, value, keys))


def _is_file(value: Any) -> bool:
    """A section may be a file of its own."""
    return isinstance(value, str) and Path(value).is_file()


def _no_section(name: str, value: Any, keys: Keys) -> str:
    """Of a section that is given a value, as if it were one key: `schedule: cosine`."""
    below = [key for key in keys if key.startswith(f"{name}.") and not is_dataclass(keys[key])]
    main = next((key for key in below if key.rpartition(".")[2] in ("name", "path")), below[0])
    hint = " It is empty: remove it, or give it keys." if value is None else f" Did you mean {main!r}?"
    return f"{name} is {value!r}, but it is a section with the keys {', '.join(below)}.{hint}"


def fitted_file(values: Mapping[str, Any], keys: Keys, above: str = "") -> dict[str, Any]:
    """The values of a file as their keys' types have them."""
    return {
        name: fitted_file(value, keys, f"{above}{name}.")
        if isinstance(value, dict) and is_dataclass(keys.get(f"{above}{name}"))
        else fitted(f"{above}{name}", value, keys)
        for name, value in values.items()
    }


def fitted(key: str, value: Any, keys: Keys) -> Any:
    """A value as its key's type has it: a word as a list of one, 1e3 as a whole number, one of several spellings.

    What does not fit is left as it is, for who checks types, but for a misspelt choice: ValueError.
    """
    types = _types(keys.get(key))
    kinds = [get_origin(one) or one for one in types]
    if list in kinds and isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    if int in kinds and isinstance(value, (float, str)) and not isinstance(value, bool) and str not in kinds:
        number = _number(value)
        return int(number) if number is not None and number == int(number) else value
    if float in kinds and isinstance(value, str) and str not in kinds:
        number = _number(value)
        return value if number is None else number
    allowed = [choice for one in types if get_origin(one) is Literal for choice in get_args(one)]
    if allowed and isinstance(value, str) and value not in (*allowed, *_more_names(key)):
        near = difflib.get_close_matches(value.lower(), [*allowed, *_more_names(key)], n=3)
        close = sorted(near, key=lambda one: not one.startswith(value.lower()))  # adam is adamw rather than badam
        hint = f" Did you mean {close[0]!r}?" if close else ""
        if type(None) not in types or value not in ("null", "None", "~", ""):
            raise ValueError(f"{key} is {value!r}; choose one of {', '.join(map(repr, allowed))}.{hint}")
    return value


def value_of(text: str) -> bool | int | float | str | None:
    """A value as a file would have it: a number, true or false, null, or a word."""
    words: dict[str, bool | None] = {"true": True, "false": False, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    number = _number(text)
    if number is None:
        return text
    return int(text) if text.lstrip("+-").isdecimal() else number


def _more_names(key: str) -> Sequence[str]:
    return {"engine": tuple(ZERO), "optimizer.name": tuple(NAMED)}.get(key, ())


def _types(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, UnionType):
        return [one for part in get_args(hint) for one in _types(part)]
    return [hint]


def _number(value: float | str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < 2**63 else None


def read_changes(words: Sequence[str], keys: Keys) -> list[tuple[str, str]]:
    """Keys and values of a command line: ``--key value`` or ``--key=value``.

    Raises ValueError for what is none, with what may be meant.
    """
    changes, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ValueError(_no_change(word, name, value, keys))
        if not is_key(name.removesuffix("+"), keys):
            hint = " Did you mean --print_config?" if name == "print-config" else meant(name, keys)
            raise ValueError(f"there is no key --{name}.{hint}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name} needs a value: --{name} VALUE.")
            value = rest.pop(0)
        if is_dataclass(keys.get(name)) and not value.lstrip().startswith("{") and not _is_file(value):
            raise ValueError(_no_section(name, value, keys))
        changes.append((name, value))
    return changes


def _no_change(word: str, name: str, value: str, keys: Keys) -> str:
    bare = name.lstrip("-")
    if is_key(bare, keys):
        shown = f"--{bare} {value or 'VALUE'}"
    else:
        hint = meant(bare, keys)
        if word.startswith("-") or value or hint:
            return f"{word} is no key and no value: keys are written --KEY VALUE.{hint}"
        return f"{word!r} stands alone: keys are written --KEY VALUE, and a value with blanks in quotes."
    return f"{word} is not how keys are written: write {shown}."


def value_for(key: str, text: str, keys: Keys) -> Any:
    """The text of a command line as the value that a file would have; who checks types says what does not fit."""
    import yaml

    kinds = [get_origin(one) or one for one in _types(keys.get(key))]
    if type(None) in kinds and text in (("null",) if str in kinds else ("null", "~", "")):
        return None
    if text[:1] in ("[", "{") and str not in kinds:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--{key} {text}: a list is written [a, b], several keys {{key: value}}.") from error
    plain = text if is_dataclass(keys.get(key)) else fitted(key, text, keys)
    return value_of(plain) if isinstance(plain, str) and str not in kinds else plain
