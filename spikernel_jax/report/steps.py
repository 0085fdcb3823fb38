"""The four steps on a run's page: the answer first, then each step with its figure and table, or what is missing."""

import html
from collections.abc import Callable
from typing import Any

import numpy as np

from spikernel_jax.cells import notation
from spikernel_jax.cells.kernels import kernel_set_text
from spikernel_jax.io.units import format_bytes
from spikernel_jax.report import intervals
from spikernel_jax.report.found import Found
from spikernel_jax.report.parts import Section, html_table


def cell_drawing(genotype: str) -> str:
    """A cell as SVG: four nodes in a row, an arc for each edge with its operation's name.

    Args:
      genotype: in explicit notation; text that is no cell gives the text itself, escaped.
    """
    try:
        edges = notation.read(genotype)
    except ValueError:
        return f"<p>{html.escape(genotype)}</p>"
    at = [60 + 180 * node for node in range(notation.NODES)]
    below = any(source > target for source, target in edges)  # feedback
    parts = []
    for (source, target), name in edges.items():
        span, up = abs(target - source), 1 if target > source else -1
        height = up * (34 * span if span > 1 else 0)
        a, b, middle = at[source] + 16 * up, at[target] - 20 * up, (at[source] + at[target]) / 2
        y = 140 - 2 * height if span > 1 else 140
        parts.append(
            f'<path d="M{a},140 Q{middle},{y} {b},140" stroke-width="2" marker-end="url(#tip)"/>'
            f'<text class="label" x="{middle}" y="{140 - height - 6}" text-anchor="middle">{html.escape(name)}</text>'
        )
    nodes = "".join(
        f'<circle cx="{x}" cy="140" r="15" stroke-width="1.5"/><text x="{x}" y="145" text-anchor="middle">{node}</text>'
        for node, x in enumerate(at)
    )
    tip = ('<marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
           '<path d="M0,0 L8,4 L0,8" stroke-width="1.5"/></marker>')  # fmt: skip
    return (
        f'<svg role="img" aria-label="{html.escape(genotype)}" viewBox="0 20 660 {230 if below else 150}">'
        f"<defs>{tip}</defs>{''.join(parts)}{nodes}</svg>"
    )


def _answer(found: Found) -> Section:
    chosen = found.summary.get("chosen")
    if not chosen:
        return Section("", missing="No model has been chosen yet: run experiments/tradeoff.py --out " + str(found.path))
    sd, n = chosen.get("test_accuracy_sd"), chosen["seeds"]
    spread, within = "", ""
    if sd is not None:
        *_, low, high = intervals.of_moments(chosen["test_accuracy"], sd, n)
        spread, within = f" ± {100 * sd:.2f}", f": mean ± sd, 95 % [{100 * low:.2f}, {100 * high:.2f}]"
    facts = [
        (f"{100 * chosen['test_accuracy']:.2f}{spread} %", f"test accuracy, n = {n} trainings{within}"),
        (f"{100 * chosen['validation_accuracy']:.2f} %", "validation accuracy, by which it was chosen"),
        (format_bytes(chosen["memory_bytes"]), f"memory, counted at {chosen['bits']} bits"),
        (f"{chosen['parameters']:,}", "parameters"),
    ]
    table = found.tables.get("tradeoff")
    if table is not None:
        (row,) = table.filter(table["chosen"]).to_dicts() or [{}]
        if row:
            facts.append((f"{row['energy_nj']:,.0f} nJ", "energy an image, counted"))
            facts.append((f"{row['synops'] / 1e6:.3f} M", "synaptic operations an image"))
    if (fired := found.tables.get("activity")) is not None:
        neurons = fired.unique("site")
        rate = np.average(neurons["rate"].to_numpy(), weights=neurons["neurons"].to_numpy())
        about = f"firing rate, a neuron and time step, of {fired['images'][0]:,} validation images"
        facts.append((f"{100 * rate:.1f} %", about))
    boxes = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>" for value, what in facts)
    helped = found.summary.get("search_helped", {}).get("text", "")
    exported = found.path / "finalists" / chosen["name"] / "checkpoint"
    load = html.escape(f'from spikernel_jax import load_model\nmodel = load_model("{exported}")')
    load = f"<pre>{load}</pre>" if exported.exists() else ""  # a published copy has none
    return Section("", (
        f"<p>Chosen: <b>{html.escape(chosen['name'])}</b>, <code>{html.escape(chosen['genotype'])}</code></p>"
        f'<div class="facts">{boxes}</div>{cell_drawing(chosen["genotype"])}<p>{_bold(helped)}</p>{load}'
    ))  # fmt: skip


def _bold(text: str) -> str:
    """Escaped, with **these** in bold."""
    parts = html.escape(text).split("**")
    return "".join(f"<b>{part}</b>" if index % 2 else part for index, part in enumerate(parts))


def _figure(found: Found, name: str, heading: str, make: Callable[[Found], Any], about: str) -> Section:
    if name not in found.tables:
        return Section(heading, missing=found.missing[name])
    return Section(heading, f'<p class="note">{html.escape(about)}</p>', make(found))


def _sets(found: Found) -> Section:
    verdicts = found.summary.get("kernel_sets")
    heading = "Step 2: kernel sets"
    if not verdicts:
        return Section(heading, missing=f"No sets have been chosen yet: run experiments/search.py --out {found.path}")
    rows = [(kernel_set_text(v["set"]), "kept" if v["kept"] else "dropped", v["reason"]) for v in verdicts]
    return Section(heading, html_table(("set", "", "why"), rows))


def _decided(found: Found) -> str:
    """Which fidelity or short training each set's finalist came out of."""
    table = found.tables.get("search")
    if table is None:
        return ""
    rows = []
    for row in table.filter(table["finalist"]).to_dicts():
        trained = row["search_epochs"]
        by = (
            f"a short training of {trained} epochs: {100 * row['search_validation']:.1f} % of validation images"
            if trained else f"its score at {row['fidelity']} fidelity"
        )  # fmt: skip
        rows.append((row["kernel_set"], row["genotype"], f"{row['score']:.3f} ± {row['score_se_paired']:.3f}", by))
    return html_table(("set", "finalist", "score ± paired SE", "decided by"), rows)


def sections_of(found: Found) -> list[Section]:
    """The steps, of whatever there is."""
    from spikernel_jax.report import interactive

    parts = [
        _answer(found),
        _figure(found, "impact", "Step 1: impact of the kernel", interactive.impact,
                "Means over seeds, whiskers one standard deviation."),
        _sets(found),
        _figure(found, "search", "Step 3: search", interactive.search,
                "A click marks a cell in the figure and in the table; names in the legend hide their set."),
    ]  # fmt: skip
    parts[-1] = parts[-1]._replace(html=parts[-1].html + _decided(found))
    parts.append(
        _figure(found, "tradeoff", "Step 4: trade-off", interactive.tradeoff,
                "Move the budget, change the bits or choose a device, and the pick moves along the finalists. "
                "A device's limits are held against the model's C. Accuracies are those of "
                "float32 networks; memory is counted, by parameters, membranes and live activations.")
    )  # fmt: skip
    parts.append(
        _figure(found, "activity", "Spikes of one image", interactive.activity,
                "The chosen model, one validation image: which part of each layer's neurons fires at each time step.")
    )  # fmt: skip
    return parts
