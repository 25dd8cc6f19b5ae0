"""A YAML file of keys and values, with words for what people get wrong in one."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Numbers as YAML 1.2 writes them: 1e-3 is one, for YAML 1.1 it is a text. A date is a text, such as a folder's."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:timestamp"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+|[-+]?(\d+\.\d*|\.\d+)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a file. Raises ValueError that names line and trouble."""
    text = _decoded(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            _check_once(node, "")
        values = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(_trouble(error, text)) from error
    if values is None:
        raise ValueError("the file is empty; write keys and values, such as `steps: 1000`, one a line.")
    if not isinstance(values, dict):
        what = "a list" if isinstance(values, list) else f"the text or number {values!r}"
        raise ValueError(f"the file holds {what}; write keys and values, such as `steps: 1000`, one a line.")
    return values


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("the file is UTF-16, as some editors save; save it as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is no UTF-8 ({error.reason}); save the file as UTF-8.") from error


def _trouble(error: yaml.YAMLError, text: str) -> str:
    tabs = [number for number, line in enumerate(text.splitlines(), start=1) if re.match(r" *\t", line)]
    mark = getattr(error, "problem_mark", None)
    if tabs and (mark is None or mark.line + 1 >= tabs[0]):
        return f"line {tabs[0]} begins with a tab; YAML is indented with spaces only."
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"{place}{getattr(error, 'problem', None) or str(error).splitlines()[0]}; this is no YAML."


def _check_once(node: yaml.Node, above: str) -> None:
    """ValueError for a key that appears twice, where YAML takes the last one in silence."""
    if isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            _check_once(inner, above)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{above}{getattr(key, 'value', '')}", key.start_mark.line + 1
        if name in lines and not name.endswith("<<"):
            raise ValueError(f"{name!r} appears twice, in lines {lines[name]} and {line}; remove one.")
        lines[name] = line
        _check_once(value, f"{name}.")
