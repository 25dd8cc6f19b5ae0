"""Reads the imports of every module of frugal_dist from its source, without importing it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "frugal_dist"
ROOT = Path(__file__).parents[2] / PACKAGE


@dataclass(frozen=True)
class Module:
    """One source file: its name in the package ("sharding.tile", "" for the package itself), its imports, its path."""

    name: str
    ours: frozenset[str]
    others: frozenset[str]
    path: Path


def read_modules() -> list[Module]:
    files = sorted(ROOT.rglob("*.py"))
    names = {_name(file) for file in files}
    return [_read(file, names) for file in files]


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _read(file: Path, names: set[str]) -> Module:
    ours, others = set(), set()
    for dotted in _imports(ast.parse(file.read_text(encoding="utf-8"))):
        head, _, rest = dotted.partition(".")
        if head == PACKAGE:
            ours.add(_longest_module(rest, names))
        else:
            others.add(dotted)
    return Module(_name(file), frozenset(ours), frozenset(others), file)


def _longest_module(dotted: str, names: set[str]) -> str:
    """`sharding.tile.Tile` -> `sharding.tile`; a name that is no module belongs to the package above it."""
    while dotted and dotted not in names:
        dotted = dotted.rpartition(".")[0]
    return dotted


def _imports(tree: ast.AST) -> set[str]:
    """Dotted names of all imports in a file, also inside functions, and of uses such as torch.distributed.get_rank."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write the full name"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            found.add(ast.unparse(node))
    return found
