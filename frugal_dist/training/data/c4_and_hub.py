"""C4 and other text as `datasets` streams it: from the Hugging Face hub, a folder laid out like one, or local files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugal_dist.training.data.local_or_hub import OFFLINE, settle_source
from frugal_dist.training.data.text_files import (
    MEND,
    check_files,
    common_kind,
    find_damage,
    find_files,
    is_lines,
    kind_of,
    no_text,
    texts_of,
)
from frugal_dist.training.recipe import Data

C4 = "allenai/c4"


class NoText(Exception):
    """An example whose column holds no text."""


@dataclass(frozen=True)
class Documents:
    """A split of a dataset as a stream of texts.

    ``label``: what to call it in messages. ``files``: those of a local source, checked; empty for the hub. ``skip``:
    examples without a text are left out.
    """

    dataset: Any
    column: str
    label: str
    files: tuple[Path, ...]
    skip: bool = False

    @property
    def local_bytes(self) -> int | None:
        """Size of the local files; None for the hub."""
        return sum(file.stat().st_size for file in self.files) if self.files else None

    def part(self, seed: int | None, epoch: int, part: int, parts: int) -> Any:
        """One of ``parts`` streams that together have every document once.

        ``seed`` and ``epoch``: of the order of the files; seed None leaves it. With as many files as parts, or a
        multiple, each part reads its own; otherwise each reads all and keeps its share.
        """
        from datasets.distributed import split_dataset_by_node

        stream = self.dataset
        if seed is not None:
            logging.getLogger("datasets.iterable_dataset").addFilter(_speaks_of_no_lost_buffer)
            # A buffer of one document: only files are shuffled here. The content of a larger buffer would be lost when
            # a run resumes; streams.py shuffles documents so that it is not.
            stream = stream.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
        if parts > 1:
            stream = split_dataset_by_node(stream, part, parts)
        stream.set_epoch(epoch)
        return stream

    def take(self, examples: Iterator[dict[str, Any]], count: int) -> tuple[list[str], int]:
        """The texts of the next ``count`` examples of a part, fewer at its end; and how many without one were skipped.

        Raises ValueError that names the file and the line or row, for local files, if one holds no text (unless
        ``skip``) or reading fails.
        """
        texts: list[str] = []
        skipped = 0
        try:
            while len(texts) < count and (example := next(examples, None)) is not None:
                text = example[self.column]
                if isinstance(text, str):
                    texts.append(text)
                elif self.skip:
                    skipped += 1
                else:
                    raise NoText(no_text(text, self.column))
        except NoText as error:
            where = find_damage(self.files, self.column)
            raise ValueError(where or f"{self.label}: {error}. {MEND}.") from error
        except Exception as error:  # of datasets, pyarrow, the unpacker, the network; many of them are ValueErrors
            raise ValueError(_unreadable(error, self.label, self.files, self.column, " any further")) from error
        return texts, skipped


def open_documents(data: Data, validation: bool = False, skip: bool = False) -> Documents:
    """The training or validation text that a recipe's ``data`` names.

    ``skip``: lines of JSONL files that cannot be read are examples without a text; all of these are left out.

    Raises ValueError, naming the key, if it cannot be had, is empty or damaged, or lacks the split or the column.
    """
    key = "data.validation_path" if validation and data.validation_path else "data.path"
    path = data.validation_path if key == "data.validation_path" else data.path
    opened = _lines_of(data, path, key) if skip and data.kind == "files" else None
    dataset, label, files = opened or _OPENERS[data.kind](data, path, validation, key)
    first = _first(dataset, label, files, data.column)
    if data.column not in first:
        raise ValueError(
            f"{label} has no column {data.column!r}: its columns are {', '.join(first)}. Set data.column to one."
        )
    return Documents(dataset.select_columns([data.column]), data.column, label, tuple(files), skip)


def _lines_of(data: Data, path: str | None, key: str) -> Opened | None:
    """The lines of JSONL files as a stream, whatever is in them; None for files of other kinds."""
    from datasets import Features, IterableDataset, Value

    files = [file for file in find_files(str(path), key) if file.stat().st_size]
    if not files or not all(kind_of(file) == "json" and is_lines(file) for file in files):
        return None
    stream = IterableDataset.from_generator(
        texts_of,
        gen_kwargs={"files": list(map(str, files)), "column": data.column},
        features=Features({data.column: Value("string")}),
    )
    return stream, _label(files), files


def _first(dataset: Any, label: str, files: Sequence[Path], column: str) -> dict[str, Any]:
    """The first example: whether the data can be read at all shows now, not at the first step."""
    try:
        example: dict[str, Any] | None = next(iter(dataset), None)
    except Exception as error:  # of datasets, pyarrow, the unpacker, the network
        raise ValueError(_unreadable(error, label, files, column)) from error
    if example is None:
        raise ValueError(f"{label} is empty.")
    return example


def _unreadable(error: Exception, label: str, files: Sequence[Path], column: str, further: str = "") -> str:
    """Where reading failed, if that can be found, and why."""
    where = find_damage(files, column)
    if where and label in map(str, files):  # it names the file already
        return where
    return f"{label} cannot be read{further}: {where or short(error) + '.'}"


def short(error: BaseException) -> str:
    """The first line of an error, and of what caused it."""
    cause = error.__cause__ or error.__context__
    text = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
    return f"{text} ({short(cause)})" if cause is not None and cause is not error else text


def _speaks_of_no_lost_buffer(record: logging.LogRecord) -> bool:
    """`datasets` warns that the content of a shuffle buffer is lost, even of one that never holds any."""
    return "shuffle buffer" not in record.getMessage()


def _speaks_of_no_row(record: logging.LogRecord) -> bool:
    """`datasets` logs a row, counted from 0 within a piece of the file, before it raises: the line is told instead."""
    return "Failed to load JSON" not in record.getMessage()


# --- kinds ------------------------------------------------------------------------------------------------------------

Opened = tuple[Any, str, list[Path]]


def _c4(data: Data, path: str | None, validation: bool, key: str) -> Opened:
    """C4, from the hub or a folder laid out like its repository; the folder may be without the README."""
    name, place = data.name or "en", path or C4
    folder, split = Path(place), _split(data, validation)
    if folder.is_dir() and not (folder / "README.md").is_file():
        files = find_files(str(folder / name / f"c4-{split}.*"), key)
        return _local("json", files, "data.documents is for text files", data)
    return hub_dataset(place, name, split, key)


def _hub(data: Data, path: str | None, validation: bool, key: str) -> Opened:
    if path is None:
        raise ValueError("data.path is not set; name the dataset on the hub, or a folder laid out like one.")
    return hub_dataset(path, data.name, _split(data, validation), key)


def _files(data: Data, path: str | None, validation: bool, key: str) -> Opened:
    if validation and key == "data.path":
        raise ValueError("data.validation_path is not set; files have no validation split, so name files for it.")
    if path is None:
        raise ValueError("data.path is not set; name a file, a folder, or a pattern such as 'texts/*.jsonl'.")
    files = find_files(path, key)
    return _local(common_kind(files, key), files, key, data)


_OPENERS: dict[str, Callable[[Data, str | None, bool, str], Opened]] = {"c4": _c4, "hub": _hub, "files": _files}


def _split(data: Data, validation: bool) -> str:
    return data.validation_split if validation else data.split


def _label(files: Sequence[Path]) -> str:
    return f"{files[0]}" if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"


def _local(builder: str, files: list[Path], key: str, data: Data) -> Opened:
    check_files(files)
    options = {"sample_by": data.documents.replace("file", "document")} if builder == "text" else {}
    label = _label(files)
    try:
        return _load(builder, data_files=list(map(str, files)), split="train", **options), label, files
    except Exception as error:  # of datasets and pyarrow
        raise ValueError(_unreadable(error, label, files, data.column)) from error


def hub_dataset(place: str, name: str | None, split: str, key: str) -> Opened:
    """A split of a dataset on the hub, or of a folder laid out like one, as a stream; its label; its files if local.

    Raises ValueError, naming the recipe's ``key``, if it cannot be had.
    """
    settle_source(place, key)
    files: list[Path] = []
    if Path(place).is_dir():
        base = Path(place) / name if name and (Path(place) / name).is_dir() else Path(place)
        files = find_files(str(base), key)
        check_files(files)
    label = f"{place} ({name}, {split})" if name else f"{place} ({split})"
    return _loaded(key, label, place, name, split=split), label, files


_ADVICE = {
    "Bad split": "Set data.split or data.validation_split to one of them, or data.validation_path to other data.",
    "BuilderConfig": "Set data.name to one of them.",
}
"""What to do, by a sign in the words of `datasets`."""


def _load(*arguments: Any, **options: Any) -> Any:
    import datasets

    logging.getLogger("datasets.packaged_modules.json.json").addFilter(_speaks_of_no_row)
    return datasets.load_dataset(*arguments, streaming=True, **options)


def _loaded(key: str, label: str, *arguments: Any, **options: Any) -> Any:
    try:
        return _load(*arguments, **options)
    except Exception as error:  # of datasets, the hub's library, the network
        advice = next((words for sign, words in _ADVICE.items() if sign in str(error)), None)
        if advice:
            raise ValueError(f"{key}: {label} is not there: {short(error)}. {advice}") from error
        raise ValueError(
            f"{key}: {label} could not be had: {short(error)}. {OFFLINE}; a folder with the dataset's files works "
            "wherever its name does."
        ) from error
