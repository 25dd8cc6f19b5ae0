"""For mkdocs: pages that lie outside docs/ are part of the site, and links to sources become plain text there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "examples/README.md",
    "launch/README.md",
    "docker/README.md",
    "ds_configs/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
)
"""From the checkout's folder. On the site they have the same path."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie elsewhere."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as the site needs them; those in the sources are right in a checkout."""
    here = page.file.src_uri
    folder = (ROOT if here in OUTSIDE else ROOT / "docs").joinpath(here).parent

    def on_site(link: re.Match[str]) -> str:
        image, words, target, anchor = link.groups()
        if "://" in target:
            return link[0]
        path = Path(os.path.normpath(folder / target)).relative_to(ROOT).as_posix()
        if path == "README.md":
            path = "docs/index.md"
        if path.startswith("docs/") or path in OUTSIDE:
            to = os.path.relpath(path.removeprefix("docs/"), os.path.dirname(here) or ".")
            return f"{image}[{words}]({to}{anchor or ''})"
        if config.repo_url:
            return f"[{words}]({config.repo_url}/blob/main/{path})"
        return words if "`" in words else f"{words} (`{path}`)"

    return LINK.sub(on_site, markdown)
