"""What a run's page is put together of: sections, and tables of text; whatever comes from a run is escaped."""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple


class Section(NamedTuple):
    """One part of the page."""

    heading: str
    html: str = ""  # escaped
    model: Any = None  # a Bokeh figure
    missing: str = ""  # why there is none


def html_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of escaped text."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(value))}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
