"""Which parameters are projected and which are regular, judged by a model's modules; and the printed report of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from torch import Tensor, nn

from frugal_dist.parameters.names import (
    check_patterns,
    clean_name,
    is_adapter,
    is_expert_stack,
    is_head,
    is_projected_name,
    is_router,
    is_vocabulary_sized,
    matches,
)

__all__ = [
    "ParameterInfo",
    "check_patterns",
    "clean_name",
    "is_projected_name",
    "matches",
    "report",
    "selection_advice",
    "split_parameters",
]

_ATTENTION_WEIGHTS = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})
_NOTHING_PROJECTED = (
    "No parameter is projected, so FRUGAL would be plain AdamW on everything. Name the weight matrices yourself with "
    'split_parameters(model, project=["*_proj.weight", ...]), or in a group with "projected": True.'
)


@dataclass(frozen=True)
class ParameterInfo:
    """How one parameter is treated: projected or regular, with weight decay or never, frozen or trained.

    ``state_bytes``: what its state takes on this rank, None where that is not known yet.
    """

    name: str
    shape: tuple[int, ...]
    projected: bool
    decay: bool
    frozen: bool = False
    state_bytes: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass
class _Entry:
    """One distinct tensor with all its names (several when tied) and the verdict on it."""

    tensor: Tensor
    names: list[str]
    eligible: bool = False  # somewhere used as a Linear weight or an expert stack
    excluded: bool = False  # somewhere used as an embedding, an output head, a router or an adapter
    table: bool = False  # somewhere used as an embedding

    def matches(self, patterns: Sequence[str] | None) -> bool:
        return any(matches(name, patterns) for name in self.names)


def split_parameters(
    model: nn.Module,
    project: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    no_decay: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Split a model's parameters into groups for `Frugal`.

    Projected by default: weights of nn.Linear, of GPT-2's Conv1D and of nn.MultiheadAttention, and 3-D stacks of expert
    matrices. Everything else is regular: embeddings (also when tied to a head), output heads (by name, by what the
    model says, or of the shape of its largest embedding), routers, LoRA's adapters, norms, biases, matrices of a single
    row or column. Frozen parameters are included; a few counts are all their state until they are unfrozen.

    Patterns are globs on parameter names or dotted suffixes of them (see `names.matches`); a tied tensor is
    found under each of its names.

    Args:
        model: any module, wrapped or not.
        project: these parameters (2-D or 3-D) are projected instead of the default selection.
        skip: these are never projected.
        no_decay: these get `"weight_decay": 0.0`.

    Returns:
        Up to four groups, none empty: {"params": [(name, tensor), ...], "projected": bool} and, where `no_decay` says
        so, "weight_decay": 0.0. Each distinct tensor appears once, under its first name.

    Raises:
        ValueError: a pattern matches nothing, `project` fits something not 2-D or 3-D, or nothing is projected.
    """
    entries = _collect(model)
    names = [name for entry in entries for name in entry.names]
    for key, patterns in (("project", project), ("skip", skip), ("no_decay", no_decay)):
        check_patterns(names, patterns, key)
    groups: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {
        (projected, decay): [] for projected in (True, False) for decay in (True, False)
    }
    for entry in entries:
        projected = not entry.matches(skip) and _is_projected(entry, project)
        groups[projected, not entry.matches(no_decay)].append((entry.names[0], entry.tensor))
    if not groups[True, True] and not groups[True, False]:
        raise ValueError(_NOTHING_PROJECTED)
    return [
        {"params": members, "projected": projected} | ({} if decay else {"weight_decay": 0.0})
        for (projected, decay), members in groups.items()
        if members
    ]


def selection_advice(infos: Sequence[ParameterInfo]) -> str:
    """What to say about a selection of which less than half is projected, or "". ValueError if nothing is.

    Frozen parameters do not count: they have no state.
    """
    if not any(info.projected for info in infos):
        raise ValueError(_NOTHING_PROJECTED)
    trained = [info for info in infos if not info.frozen]
    total = sum(info.numel for info in trained)
    projected = sum(info.numel for info in trained if info.projected)
    if projected >= total / 2:
        return ""
    largest = max((info for info in trained if not info.projected), key=lambda info: info.numel)
    share = f"Only {projected / total:.0%}" if projected else "None"
    return (
        f"{share} of the parameters are projected{_beside_frozen(infos)}; FRUGAL saves memory on those alone. "
        f"The largest regular one is {largest.name} with {largest.numel:,} elements. To choose yourself, name all that "
        'shall be projected: project=["*_proj.weight", ...] in split_parameters or Frugal, "project" in DeepSpeed\'s '
        "JSON, optimizer.project in a recipe."
    )


def _beside_frozen(infos: Sequence[ParameterInfo]) -> str:
    frozen = sum(info.frozen for info in infos)
    return f" (not counting {frozen} that are frozen)" if frozen else ""


def report(infos: Sequence[ParameterInfo], collapse: bool = True) -> str:
    """A table of every parameter and its treatment, with totals.

    With `collapse`, equal parameters of numbered layers share a line: `layers.{0-11}.mlp.up_proj.weight`. Columns for
    frozen ones and for the bytes of their state are there if there are any.
    """
    head, aligns = ["parameter", "shape", "number", "elements", "treatment", "decay"], ["<", ">", ">", ">", "<", "<"]
    frozen, counted = any(info.frozen for info in infos), any(info.state_bytes is not None for info in infos)
    head, aligns = head + ["frozen"] * frozen + ["state bytes"] * counted, aligns + ["<"] * frozen + [">"] * counted
    lines = _collapsed(infos) if collapse else [(info.name, [info]) for info in infos]
    rows = [
        [
            name,
            "×".join(map(str, members[0].shape)) or "scalar",
            str(len(members)),
            f"{sum(info.numel for info in members):,}",
            "projected" if members[0].projected else "regular",
            "yes" if members[0].decay else "no",
            *(["yes" if members[0].frozen else "no"] * frozen),
            *([f"{sum(info.state_bytes or 0 for info in members):,}"] * counted),
        ]
        for name, members in lines
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    table = [_align(row, widths, aligns) for row in (head, ["-" * width for width in widths], *rows)]
    return "\n".join([*table, "", *_totals(infos)])


def _collect(model: nn.Module) -> list[_Entry]:
    """Every distinct parameter, in the order of `named_parameters`, with the verdict of all modules that use it."""
    entries: dict[int, _Entry] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: run the model once on a batch before building the optimizer.")
        entries.setdefault(id(tensor), _Entry(tensor, [])).names.append(name)
    heads = {id(tensor) for head in _output_embeddings(model) for tensor in head.parameters()}
    for path, module in model.named_modules(remove_duplicate=False):
        for local, tensor in module.named_parameters(recurse=False):
            entry, name, shape = entries[id(tensor)], f"{path}.{local}".lstrip("."), _shape(tensor)
            entry.eligible |= (
                tensor.is_floating_point() and min(shape, default=0) > 1 and _is_matrix(module, name, shape)
            )
            entry.table |= _is_embedding(module)
            entry.excluded |= id(tensor) in heads or is_head(name) or is_router(name, shape) or is_adapter(name)
    tables = {_shape(entry.tensor) for entry in entries.values() if entry.table}
    for entry in entries.values():
        sized = any(is_vocabulary_sized(name, _shape(entry.tensor), tables) for name in entry.names)
        entry.excluded |= entry.table or sized
    return list(entries.values())


def _is_projected(entry: _Entry, project: Sequence[str] | None) -> bool:
    if project is None:
        return entry.eligible and not entry.excluded
    if not entry.matches(project):
        return False
    shape = _shape(entry.tensor)
    if len(shape) not in (2, 3):
        raise ValueError(
            f"project matches {entry.names[0]} of shape {shape}, which is no matrix. Only 2-D parameters and 3-D "
            "stacks of matrices can be projected: narrow the pattern or name this one in skip."
        )
    return True


def _is_matrix(module: nn.Module, name: str, shape: tuple[int, ...]) -> bool:
    """Whether `module` multiplies its input with this parameter of its own, as a matrix or a stack of them."""
    if min(shape, default=0) < 2:
        return False
    local = name.rpartition(".")[2]
    if len(shape) == 3:
        convolution = isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
        return not convolution and is_expert_stack(name, owner=type(module).__name__)
    if len(shape) != 2:
        return False
    if isinstance(module, nn.MultiheadAttention):
        return local in _ATTENTION_WEIGHTS
    return local == "weight" and (isinstance(module, nn.Linear) or "Conv1D" in _class_names(module))


def _is_embedding(module: nn.Module) -> bool:
    """nn.Embedding, nn.EmbeddingBag, and the vocabulary-parallel ones of other libraries."""
    return any("Embedding" in name for name in _class_names(module))


def _class_names(module: nn.Module) -> list[str]:
    """Names of the class and its bases: the library that a class comes from need not be installed to recognise it."""
    return [cls.__name__ for cls in type(module).__mro__]


def _output_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """The heads that Hugging Face models in `model` name themselves."""
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        if get is None:
            continue
        # Models without a head raise one of these instead of returning None.
        with contextlib.suppress(NotImplementedError, AttributeError):
            head = get()
            if isinstance(head, nn.Module):
                yield head


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The full shape; under ZeRO-3 the tensor itself may be empty and carries its shape as `ds_shape`."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _collapsed(infos: Sequence[ParameterInfo]) -> list[tuple[str, list[ParameterInfo]]]:
    """Lines of the table: numbers in names become ranges where all combinations exist and are treated alike."""
    alike: dict[tuple[str, tuple[int, ...], bool, bool, bool], list[ParameterInfo]] = {}
    for info in infos:
        template = re.sub(r"(?<![^.])\d+(?![^.])", "{}", info.name)
        alike.setdefault((template, info.shape, info.projected, info.decay, info.frozen), []).append(info)
    lines: list[tuple[str, list[ParameterInfo]]] = []
    for (template, *_), members in alike.items():
        numbers = [tuple(map(int, re.findall(r"(?<![^.])\d+(?![^.])", info.name))) for info in members]
        axes = [sorted(set(axis)) for axis in zip(*numbers, strict=True)]
        if len(members) > 1 and sorted(numbers) == list(product(*axes)):
            lines.append((template.format(*map(_ranges, axes)), members))
        else:
            lines.extend((info.name, [info]) for info in members)
    return lines


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}", and a single number as it is."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else "{" + text + "}"


def _align(row: Sequence[str], widths: Sequence[int], aligns: Sequence[str]) -> str:
    return "  ".join(f"{cell:{align}{width}}" for cell, width, align in zip(row, widths, aligns, strict=True)).rstrip()


def _totals(infos: Sequence[ParameterInfo]) -> list[str]:
    total = sum(info.numel for info in infos)
    kinds = {
        "projected": [info for info in infos if info.projected and not info.frozen],
        "regular": [info for info in infos if not info.projected and not info.frozen],
        "frozen": [info for info in infos if info.frozen],
    }
    lines = []
    for word, members in kinds.items():
        elements = sum(info.numel for info in members)
        if members or word != "frozen":
            lines.append(f"{word}: {len(members)} parameters, {elements:,} elements ({elements / max(total, 1):.1%})")
    return [*lines, f"total: {len(infos)} parameters, {total:,} elements"]
