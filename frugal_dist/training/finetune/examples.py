"""Labelled texts for fine-tuning: a GLUE task, or CSV, TSV or JSONL files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugal_dist.training.data.c4_and_hub import hub_dataset, short
from frugal_dist.training.data.text_files import check_files
from frugal_dist.training.finetune.glue import TASKS
from frugal_dist.training.finetune.recipe import LabelledData

_SHOWN = 5


@dataclass(frozen=True)
class Examples:
    """Texts, second texts (None where there are none) and labels as they were found, number by number."""

    where: str
    texts: list[str]
    pairs: list[str] | None
    labels: list[Any]


@dataclass(frozen=True)
class Labelled:
    """Training and validation examples, the names of the classes (empty for a regression), and the metrics.

    The labels of ``train`` and ``validation`` are class numbers, or floats for a regression.
    """

    train: Examples
    validation: Examples
    classes: tuple[str, ...]
    metrics: tuple[str, ...]


def read_examples(data: LabelledData) -> Labelled:
    """What a recipe's ``data`` names.

    Raises ValueError, naming file, line, column or key, for what is missing, empty or damaged, for labels that are no
    numbers (regression), fewer than two classes, and classes of the validation examples that training lacks.
    """
    return _task(data, str(data.task)) if data.task is not None else _files(data)


# --- GLUE -------------------------------------------------------------------------------------------------------------


def _task(data: LabelledData, name: str) -> Labelled:
    task = TASKS[name]
    train, names = _split(data, name, "train")
    validation, _ = _split(data, name, data.validation_split or task.validation)
    metrics = tuple(data.metrics or task.metrics)
    if task.regression:
        return Labelled(_numbers(train), _numbers(validation), (), metrics)
    for half in (train, validation):
        bad = [label for label in half.labels if not isinstance(label, int) or not 0 <= label < len(names)]
        if bad:
            raise ValueError(f"{half.where} has the label {bad[0]!r}; its classes are 0 to {len(names) - 1}.")
    return Labelled(train, validation, names, metrics)


def _split(data: LabelledData, name: str, split: str) -> tuple[Examples, tuple[str, ...]]:
    """The examples of a split, and the names of its classes."""
    task = TASKS[name]
    dataset, where, _ = hub_dataset(data.source, name, split, "data.source")
    rows = _read(dataset, where)
    examples = _examples(rows, where, task.columns[0], task.columns[1] if len(task.columns) > 1 else None, "label")
    feature = (dataset.features or {}).get("label")
    names = getattr(feature, "names", None) or sorted({str(label) for label in examples.labels})
    return examples, tuple(names)


def _read(dataset: Any, where: str) -> list[dict[str, Any]]:
    try:
        return list(dataset)
    except Exception as error:  # of datasets, pyarrow, the network
        raise ValueError(f"{where} cannot be read: {short(error)}.") from error


# --- files ------------------------------------------------------------------------------------------------------------


def _files(data: LabelledData) -> Labelled:
    train = _file(data, data.train, "data.train")
    validation = _file(data, data.validation, "data.validation")
    if data.regression:
        return Labelled(_numbers(train), _numbers(validation), (), tuple(data.metrics or ("pearson", "spearman")))
    classes = _classes(train)
    metrics = tuple(data.metrics or ("accuracy",))
    return Labelled(_numbered(train, classes), _numbered(validation, classes), classes, metrics)


def _file(data: LabelledData, name: str | None, key: str) -> Examples:
    path = Path(str(name))
    if not path.is_file():
        raise ValueError(f"{key} is {str(path)!r}, where there is no file.")
    if path.suffix not in _READERS:
        raise ValueError(f"{key} is {path}: its name must end in one of {', '.join(_READERS)}.")
    check_files([path])
    try:
        rows = list(_READERS[path.suffix](path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged or not what its name says: {error}.") from error
    return _examples(rows, str(path), data.text, data.text_pair, data.label)


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin with a byte order mark
        dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
        # Not strict, a quote that is not closed would swallow the rows up to the next one in silence.
        rows, begins = csv.reader(file, dialect, strict=True), 1
        header: list[str] = []
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise ValueError(
                    f"{path}, line {begins}: a quote is not closed, or stands inside of a quoted text ({error}). Close "
                    'it; quotes inside of a text are doubled: "a ""word"" of it".'
                ) from error
            if row is None:
                return
            if row and not header:
                header = [name.strip() for name in row]
            elif row:
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {begins} has {len(row)} columns, its header has {len(header)}. A text with the "
                        "separator in it needs quotes around it."
                    )
                yield dict(zip(header, row, strict=True))
            begins = rows.line_num + 1


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is not a JSON object.")
            yield row


_READERS = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".json": _jsonl}


# --- checked ----------------------------------------------------------------------------------------------------------


def _examples(rows: Sequence[dict[str, Any]], where: str, text: str, pair: str | None, label: str) -> Examples:
    """The columns of a file, each value looked at."""
    if not rows:
        raise ValueError(f"{where} has no examples.")
    wanted = {text: "data.text", label: "data.label"} | ({} if pair is None else {pair: "data.text_pair"})
    for column, key in wanted.items():
        if column not in rows[0]:
            columns = ", ".join(str(name) for name in rows[0])
            raise ValueError(f"{where} has no column {column!r}: its columns are {columns}. Set {key} to one.")
    for number, row in enumerate(rows, start=1):
        for column in (text, *(() if pair is None else (pair,))):
            if not isinstance(row.get(column), str):
                raise ValueError(f"{where}, example {number}: {column!r} is {row.get(column)!r}, no text.")
        if row.get(label) is None or str(row[label]).strip() == "":
            raise ValueError(f"{where}, example {number}: {label!r} is empty, there must be a label.")
    pairs = None if pair is None else [row[pair] for row in rows]
    labels = [row[label].strip() if isinstance(row[label], str) else row[label] for row in rows]
    return Examples(where, [row[text] for row in rows], pairs, labels)


def _numbers(examples: Examples) -> Examples:
    """With the labels of a regression."""
    numbers = []
    for number, label in enumerate(examples.labels, start=1):
        try:
            numbers.append(float(label))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{examples.where}, example {number}: the label {label!r} is no number.") from error
    return Examples(examples.where, examples.texts, examples.pairs, numbers)


def _classes(train: Examples) -> tuple[str, ...]:
    """In the order of numbers if they are whole numbers, otherwise of the alphabet."""
    classes = {str(label) for label in train.labels}
    if len(classes) < 2:
        raise ValueError(f"{train.where}: all labels are {next(iter(classes))!r}; there is nothing to learn.")
    if len(classes) > max(100, len(train.labels) // 2):
        raise ValueError(
            f"{train.where} has {len(classes)} different labels among {len(train.labels)} examples, such as "
            f"{_some(classes)}: set data.label to the column with the classes, or data.regression for numbers."
        )
    whole = all(label.lstrip("-").isdigit() for label in classes)
    return tuple(sorted(classes, key=int) if whole else sorted(classes))


def _numbered(examples: Examples, classes: Sequence[str]) -> Examples:
    """With the numbers of the classes in place of their names."""
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = {str(label) for label in examples.labels} - set(numbers)
    if unknown:
        raise ValueError(
            f"{examples.where} has the label(s) {_some(unknown)}, which are not in the training examples: those have "
            f"{_some(classes)}."
        )
    return Examples(examples.where, examples.texts, examples.pairs, [numbers[str(label)] for label in examples.labels])


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(repr(name) for name in ordered[:_SHOWN]) + more
