"""What outsiders meet first is whole: links lead somewhere, workflows and forms are valid, versions agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
    cwd=ROOT, capture_output=True, text=True, check=False,
).stdout.split()  # fmt: skip


def test_links_lead_to_files() -> None:
    if not PAGES:
        pytest.skip("this is no git checkout")
    texts = {page: re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S) for page in PAGES}
    links = [(page, target) for page, text in texts.items() for target in re.findall(r"\]\(([^)#\s]+)", text)]
    assert [
        link for link in links if "://" not in link[1] and not (ROOT / link[0]).parent.joinpath(link[1]).exists()
    ] == []


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/*.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_workflows_forms_and_citation_are_valid(schema: str, files: str) -> None:
    checker = Path(sys.executable).with_name("check-jsonschema")
    if not checker.exists():
        pytest.skip("check-jsonschema is not in this environment; the dev extra has it")
    found = sorted(ROOT.glob(files))
    assert found
    done = subprocess.run([checker, "--builtin-schema", schema, *found], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_that_workflows_name_exist() -> None:
    text = "".join(file.read_text() for file in WORKFLOWS.glob("*.yml"))
    named = re.findall(r"\bbash ([\w./]+\.sh)", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_docs_job_installs_the_docs_extra() -> None:
    text = (WORKFLOWS / "ci.yml").read_text()
    assert all(f"'{requirement}'" in text for requirement in PROJECT["optional-dependencies"]["docs"])


def test_the_citation_has_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.M)[1] == PROJECT["version"]
