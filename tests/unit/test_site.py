"""The site builds without a warning, and its figures are those that their scripts draw."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.heavy
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed; the dev extra has it")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in ("Frugal", "split_parameters", "checkpoint.save", "integrations.transformers.FrugalCallback"):
        assert f'id="frugal_dist.{name}"' in reference
    assert "state_free_lr_scale" in reference
    assert (tmp_path / "site" / "launch" / "index.html").exists()
    assert (tmp_path / "site" / "images" / "tiles.svg").exists()


def test_the_figures_are_drawn_by_their_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = module_at(ROOT / "docs" / "figures.py")
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    for draw in (figures.split, figures.tiles, figures.exchange, figures.refresh):
        draw()
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == 4
    for file in drawn:
        assert file.read_text() == (ROOT / "docs" / "images" / file.name).read_text()


def test_the_picture_of_the_comparison_has_the_numbers_of_its_table() -> None:
    script = module_at(ROOT / "benchmarks" / "comparison_picture.py")
    rows = script.rows_of(script.PAGE.read_text())
    assert {"AdamW", "FRUGAL, svd"} <= {row[0] for row in rows}
    shown = re.findall(r">([^<>\n]+)</text>", script.PICTURE.read_text())
    for name, _, mean, state in rows:
        assert {name, mean, f"{state:.1f}"} <= set(shown)
