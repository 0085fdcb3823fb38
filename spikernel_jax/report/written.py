"""What a run wrote in words, report.md, as parts of its page."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spikernel_jax.report.found import REPORT, Found
from spikernel_jax.report.parts import Section


def sections_of(found: Found) -> list[Section]:
    """The report's sections in its order, figures within them; what it says is missing where there is none.

    Tags in its Markdown are escaped. What comes before the first section has no heading; the title is left out.
    """
    if found.report is None:
        return [Section("", missing=f"{found.path / REPORT} is missing: the run is not finished")]
    reader = _reader(found.path)
    tokens = reader.parse(found.report)
    at = [index for index, token in enumerate(tokens) if token.type == "heading_open" and token.tag in ("h1", "h2")]
    first = at[0] if at else len(tokens)
    parts = [Section("", reader.renderer.render(tokens[:first], reader.options, {}))] if first else []
    for begin, end in zip(at, [*at[1:], len(tokens)], strict=True):  # opening, text, closing, and what stands below
        heading = tokens[begin + 1].content if tokens[begin].tag == "h2" else ""
        parts.append(Section(heading, reader.renderer.render(tokens[begin + 3 : end], reader.options, {})))
    return parts


def _reader(folder: Path) -> Any:
    """Reads Markdown; figures of the folder are put in place, other images named alone."""
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
    return reader
