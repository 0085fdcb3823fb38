"""Makes results/, which lies beside docs/, a part of the site; links to it are as a checkout has them."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHOWN = (".md", ".png", ".html", ".json")


def on_files(files: Files, config: Any) -> Files:
    """Adds reports, whole runs as pages, tables and figures."""
    for path in sorted(RESULTS.rglob("*")):
        if path.suffix in SHOWN:
            uri = path.relative_to(RESULTS.parent).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """In the site results/ lies inside docs/, one level lower.

    Raises:
      PluginError: a link leads to what the site does not have; MkDocs itself looks at links to pages alone.
    """
    for target in re.findall(r"\]\((?:\.\./)+results/([^)#]+)", markdown):
        if not (RESULTS / target).is_file() or Path(target).suffix not in SHOWN:
            raise PluginError(f"{page.file.src_uri}: results/{target} is no part of the site")
    return re.sub(r"\]\(((?:\.\./)*)\.\./results/", r"](\1results/", markdown)
