"""The wheel builds without network, holds what it must, and works when installed into an empty environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_BEHIND = ("runs", "data", "outputs", "wandb", "hosts", "frugal_dist_old")
"""Folders that runs, trackers and users make in a checkout; some are called like test modules or the package."""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves build/ and *.egg-info beside the source
    shutil.copytree(ROOT / "frugal_dist", source / "frugal_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in LEFT_BEHIND:
        (source / name).mkdir()
        (source / name / "mine.py").touch()
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = (file for kind in ("*.py", "*.cpp") for file in (ROOT / "frugal_dist").rglob(kind))
    expected = {str(file.relative_to(ROOT)) for file in sources} | {"frugal_dist/py.typed"}
    assert "frugal_dist/update/kernels/native.cpp" in expected
    recipes = ROOT / "frugal_dist" / "training" / "recipes"
    expected |= {str(file.relative_to(ROOT)) for file in recipes.rglob("*") if file.is_file()}
    assert any(name.endswith(".json") for name in expected)  # of a recipe that names it
    assert expected <= names
    assert {name.partition("/")[0] for name in names} == {
        "frugal_dist",
        f"{'-'.join(wheel.name.split('-')[:2])}.dist-info",
    }


def test_the_source_distribution_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    build = "from setuptools import build_meta; build_meta.build_sdist({!r})"
    run(sys.executable, "-c", build.format(str(tmp_path)), cwd=wheel.parent / "source")
    (archive,) = tmp_path.glob("frugal_dist-*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", tmp_path, archive, cwd=tmp_path)
    (again,) = tmp_path.glob("*.whl")
    assert again.name == wheel.name
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_folders_that_are_left_in_a_checkout_change_nothing_that_ruff_says(tmp_path: Path) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not in this environment; the dev extra has it")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in LEFT_BEHIND:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text("import sys, os\n")
    run(ruff, "check", "--no-cache", ".", cwd=tmp_path)
    checked = run(ruff, "check", "--show-files", ".", cwd=tmp_path).split()
    ours = {str(path) for path in tmp_path.rglob("*.py") if path.is_relative_to(tmp_path / "tests")}
    assert set(checked) == {*ours, str(tmp_path / "pyproject.toml")}  # and tests/dist is not taken for a build


def test_the_wheel_states_license_dependencies_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(info["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "licenses/LICENSE" in info
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert [line.split()[1].split("<")[0].split(">")[0] for line in needed] == ["torch"]
    assert "frugal-dist = frugal_dist.cli:console" in archive.read(info["entry_points.txt"]).decode()


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "venv"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    # Only torch's own folder of packages is lent to it, after its own; the checkout is not on its path.
    lent = sysconfig.get_paths()["purelib"]
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip()
    (Path(site) / "lent.pth").write_text(lent + "\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=tmp_path)
    shown = run(python, "-c", "import frugal_dist; print(frugal_dist.__file__)", cwd=tmp_path)
    assert Path(shown.strip()).is_relative_to(place)
    assert "usage" in run(place / "bin" / "frugal-dist", "--help", cwd=tmp_path)
