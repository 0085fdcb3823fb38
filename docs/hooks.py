"""Makes results/, which lies beside docs/, a part of the site; links to it are as a checkout has them."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[1] / "results"


def on_files(files: Files, config: Any) -> Files:
    """Adds reports, tables in Markdown and figures."""
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in (".md", ".png"):
            uri = path.relative_to(RESULTS.parent).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """In the site results/ lies inside docs/, one level lower."""
    return re.sub(r"\]\(((?:\.\./)*)\.\./results/", r"](\1results/", markdown)
