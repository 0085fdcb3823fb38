"""What a run wrote in words, report.md, as parts of its page."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikernel_jax.report.found import REPORT, Found
from spikernel_jax.report.parts import Section


def sections_of(found: Found) -> list[Section]:
    """The report's sections in its order, figures within them; what it says is missing where there is none."""
    if found.report is None:
        return [Section("", missing=f"{found.path / REPORT} is missing: the run is not finished")]
    return [Section(heading, as_html(text, found.path)) for heading, text in _split(found.report)]


def _split(text: str) -> list[tuple[str, str]]:
    """(heading, Markdown) of each section; what comes before the first has no heading, and the title is left out."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            parts.append((line[3:].strip(), []))
        elif not line.startswith("# ") or fenced:
            parts[-1][1].append(line)
    return [(heading, "\n".join(lines)) for heading, lines in parts]


def as_html(text: str, folder: Path) -> str:
    """Markdown as HTML: tags within it are escaped, figures of the folder put in place, other images named alone."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(renderer: Any, tokens: Sequence[Any], index: int, options: Any, env: Any) -> str:
        token = tokens[index]
        name, alt = str(token.attrs["src"]), html.escape(token.content)
        path = folder / name
        if path.suffix != ".png" or not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            return alt
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        return f'<img alt="{alt}" src="data:image/png;base64,{data}">'

    reader.add_render_rule("image", image)
    return reader.render(text)
