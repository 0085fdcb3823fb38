"""``report.html``: a whole run on one page that opens offline, from what the run's folder holds.

Of the four steps the answer comes first, then the steps with their figures and tables; of another study its report.
Then the curves of its trainings, all its tables, and what was run. Of a run that is not finished, the page says what is
missing; a damaged table is named, and not drawn. Whatever comes from a run is escaped.
"""

import hashlib
import html
import json
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from spikernel_jax.io.files import atomic_path
from spikernel_jax.io.run_folder import commit_text
from spikernel_jax.io.units import format_bytes
from spikernel_jax.report import steps, written
from spikernel_jax.report.found import TABLES, Found, digest, find
from spikernel_jax.report.parts import Section, html_table

PAGE = "report.html"


def _run(found: Found) -> Section:
    environment = found.record["environment"]
    device = environment["device"]
    seconds = ", ".join(f"{step} {value} s" for step, value in found.summary.get("seconds", {}).items())
    rows = [
        ("command", " ".join(environment["command"])), ("commit", commit_text(environment)),
        ("begun", environment["created"]), ("resumed", len(found.record["resumed"])),
        ("device", f"{device['count']} x {device['kind']}, {environment['cpus']} cores"),
        ("python", environment["python"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())),
        ("time by step", seconds or "-"), ("images", json.dumps(found.record["config"].get("images", {}))),
    ]  # fmt: skip
    on = f"experiments/explore.py --out {found.path}" if found.of_steps else shlex.join(environment["command"])
    again = html.escape(f"python {on}\npython experiments/report.py {found.path}")
    text = f'{html_table(("", ""), rows)}<p class="note">To go on, or to make this page anew:</p><pre>{again}</pre>'
    return Section("What was run", text)


def sections_of(found: Found) -> list[Section]:
    """The page's parts, of whatever there is."""
    from spikernel_jax.report import interactive

    parts = steps.sections_of(found) if found.of_steps else written.sections_of(found)
    if found.curves:
        parts.append(Section("Training", model=interactive.curves(found.curves)))
    parts += [Section(f"Table: {name}", model=interactive.whole(name, table)) for name, table in found.others.items()]
    damaged = [(name, why) for name, why in found.missing.items() if name not in TABLES]
    if damaged:
        parts.append(Section("Damaged", html_table(("what", "why"), damaged)))
    return [*parts, _run(found)]


def compared(found: Sequence[Found]) -> list[Section]:
    """Several runs side by side: the chosen model of each, and what each was."""
    rows = []
    for run in found:
        chosen, seconds = run.summary.get("chosen", {}), run.summary.get("seconds", {})
        rows.append((
            run.path.name, run.title, chosen.get("name", "-"), chosen.get("genotype", "-"),
            f"{100 * chosen['validation_accuracy']:.2f}" if chosen else "-",
            f"{100 * chosen['test_accuracy']:.2f} (n = {chosen['seeds']})" if chosen else "-",
            format_bytes(chosen["memory_bytes"]) if chosen else "-",
            f"{sum(seconds.values()):,.0f}" if seconds else "-",
        ))  # fmt: skip
    header = ("run", "what", "chosen", "cell", "validation %", "test %", "memory", "seconds")
    return [Section("", html_table(header, rows))]


def keep_page(path: str | Path) -> None:
    """Writes the page of a run, but where the one there is whole and of the very same files: drawing takes seconds."""
    page = Path(path) / PAGE
    there = page.read_text("utf-8", errors="replace") if page.exists() else ""
    if there != _sealed(there.rpartition("\n<!--")[0], digest(path)):
        write_page([path])


def _sealed(text: str, of: str) -> str:
    """A page that ends with what it was drawn of, and its own digest."""
    return f"{text}\n<!-- of {of}, {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def write_page(paths: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the page of a run, or of several runs side by side, atomically.

    Args:
      paths: folders of runs.
      out: the file; None is `PAGE` in the folder of the only run.

    Returns:
      The file.

    Raises:
      ValueError: a folder is no run's, or several are given without a file.
    """
    of = digest(paths[0]) if len(paths) == 1 else "several"
    runs = [find(path) for path in paths]
    if out is None and len(runs) != 1:
        raise ValueError(f"{len(runs)} runs: give --out, the file to write")
    if len(runs) == 1:
        (run,) = runs
        title, sections = run.title, sections_of(run)
    else:
        title, sections = f"{len(runs)} runs", compared(runs)
        for run in runs:
            sections += [
                part._replace(heading=f"{run.path.name}: {part.heading or 'answer'}") for part in sections_of(run)
            ]
    path = Path(out) if out else runs[0].path / PAGE
    with atomic_path(path) as temporary:
        temporary.write_text(_sealed(_render(title, sections), of), encoding="utf-8")
    return path


def _render(title: str, sections: Sequence[Section]) -> str:
    """The whole page; scripts and styles are within it, and its policy lets no request leave it."""
    from bokeh.embed import components
    from bokeh.resources import Resources
    from jinja2 import Environment
    from markupsafe import Markup

    from spikernel_jax.report import interactive

    drawn = [section for section in sections if section.model is not None]
    interactive.join([section.model for section in drawn])
    script, divisions = components([section.model for section in drawn]) if drawn else ("", ())
    figures = dict(zip(map(id, drawn), divisions, strict=True))
    needed = Resources(mode="inline", components=["bokeh", "bokeh-gl", "bokeh-widgets", "bokeh-tables"])
    source = resources.files("spikernel_jax.report").joinpath("templates/report.html.j2").read_text("utf-8")
    template = Environment(autoescape=True).from_string(source)
    return template.render(
        title=title,
        resources=Markup(needed.render()) if drawn else "",
        script=Markup(script),
        sections=[
            {
                "heading": section.heading,
                "anchor": f"part-{index}",
                "missing": section.missing,
                "html": Markup(section.html),
                "figure": Markup(figures[id(section)]) if id(section) in figures else "",
            }
            for index, section in enumerate(sections)
        ],
    )
