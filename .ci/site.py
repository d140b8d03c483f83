"""mkdocs hook: pages of the site that lie outside docs/, and the links between them and docs/.

README.md is the home page; CONTRIBUTING.md, CHANGELOG.md and benchmarks/README.md are pages too. They and the pages of
docs/ link to each other as GitHub needs it; here the links are rewritten for the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "speed.md",
    "LICENSE": "LICENSE",
    "CITATION.cff": "CITATION.cff",
    "benchmarks/domain.json": "domain.json",
}
"""File of the repository -> file of the site; files of docs/ keep their names."""
LINK = re.compile(r"(?<=\]\()(?P<target>[^)#\s:]+)(?=[)#])")


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = next((name for name, shown in PAGES.items() if shown == page.file.src_uri), f"docs/{page.file.src_uri}")

    def site_link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))
        if not target.startswith("docs/") and target not in PAGES:
            return match["target"]
        shown = PAGES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(shown, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(site_link, markdown)
