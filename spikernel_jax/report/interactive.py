"""The page's figures and tables that can be tried: Bokeh models, and the script that joins them.

Bokeh, because sliders, linked selection, sortable tables and WebGL come with it, in 2.1 MB of script (plotly 4.8 MB;
Vega-Lite has no sortable table). All glue is in `_BUDGET`, `_FILTER`, `_HAVING`, `_JOIN` and
`_CSV`.
"""

# Bokeh's properties have no types that a checker could follow.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from bokeh import models
from bokeh.layouts import column, row
from bokeh.models.widgets import tables as widgets
from bokeh.plotting import figure

from spikernel_jax.report.figures import BLUE, COLOURS, GREEN, GREY, ORANGE, RED, kernel_text
from spikernel_jax.report.found import Found

if TYPE_CHECKING:
    import polars as pl

_MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "x")
_MOST_NAMES = 24  # of trainings in a legend
_MOST_COLUMNS = 9  # that fit beside each other
_INK = "#808080"  # readable on a white and on a black page

_TABLE_STYLE = """
:host { color: inherit; }
.slick-header, .slick-header-column, .slick-row, .slick-row.odd, .slick-row.even
  { background: transparent; color: inherit; }
.slick-header-column, .slick-cell { border-color: #80808055; }
.slick-cell.selected { background: #0072b255; }
"""
_INPUT_STYLE = """
.bk-input, .bk-btn, .bk-btn.bk-active { background: transparent; color: inherit; border-color: #80808088; }
.bk-input option { color: #000; }
.bk-btn.bk-active { border-color: #0072b2; box-shadow: inset 0 0 0 1px #0072b2; }
"""
_WRAP = {"flex-wrap": "wrap"}  # on a narrow screen

_FILTER = """
const d = source.data, own = set.value, within = fits.active, [low, high] = depth.value, has = text.value;
const sized = size.value === "all" ? /(?:)/ : new RegExp("conv" + size.value + "(?![0-9])");
return d.genotype.map((genotype, i) => (own === "all" || d.kernel_set[i] === own) && (!within || d.fits[i])
  && d.conv_edges[i] >= low && d.conv_edges[i] <= high && genotype.includes(has) && sized.test(genotype));
"""
_AGAIN = "filter.change.emit()"
_HAVING = """
const columns = Object.values(source.data), shown = [];
for (let i = 0; i < source.get_length(); i++)
  shown.push(columns.some((column) => String(column[i]).includes(text.value)));
return shown;
"""
_CSV = """
const names = Object.keys(source.data).filter((name) => !name.startsWith("_") && name !== "index");
const quoted = (value) => '"' + String(value).replaceAll('"', '""') + '"';
const lines = [names.map(quoted).join(",")];
for (let i = 0; i < source.get_length(); i++)
  lines.push(names.map((name) => quoted(source.data[name][i])).join(","));
const link = document.createElement("a");
link.href = URL.createObjectURL(new Blob([lines.join("\\n") + "\\n"], {type: "text/csv"}));
link.download = file;
link.click();
URL.revokeObjectURL(link.href);
"""
_JOIN = """
if (!cb_obj.indices.length) return;
const chosen = new Set(cb_obj.indices.map((i) => from.data._cell[i]));
const marked = [];
to.data._cell.forEach((cell, i) => { if (chosen.has(cell)) marked.push(i); });
if (String(marked) !== String(to.selected.indices)) to.selected.indices = marked;
"""
_ANY = "any"  # device
_BUDGET = """
const d = source.data, bits = Number(width.value), bytes = d["_bytes" + bits], limit = 1024 * budget.value;
const here = device.value, broken = here === any ? null : JSON.parse(limits)[here][bits];
const of = (here === any ? "" : here + " and ") + budget.value.toFixed(1) + " KiB at " + bits + " bits";
let best = -1;
const kib = [], why = [];
for (let i = 0; i < d.name.length; i++) {
  kib.push(bytes[i] / 1024);
  if (d.role[i] !== "finalist") continue;
  if (broken && broken[i]) why.push("\\n" + d.name[i] + ": " + broken[i]);
  if (!(bytes[i] <= limit) || (broken && broken[i])) continue;
  if (best < 0 || d.validation[i] > d.validation[best]
      || (d.validation[i] === d.validation[best] && bytes[i] < bytes[best])) best = i;
}
d.kib = kib;
line.location = budget.value;
pick.data = best < 0 ? {kib: [], validation: []} : {kib: [kib[best]], validation: [d.validation[best]]};
answer.text = best < 0
  ? "No finalist fits " + of + "." + why.join("")
  : d.name[best] + " fits " + of + ": " + kib[best].toFixed(1)
    + " KiB, validation " + d.validation[best].toFixed(2) + " %, " + d.genotype[best];
source.change.emit();
"""


def _figure(title: str, x: str, y: str, **more: Any) -> Any:
    plot = figure(
        title=title, x_axis_label=x, y_axis_label=y, height=380, sizing_mode="stretch_width",
        tools="pan,box_zoom,wheel_zoom,reset,save", background_fill_alpha=0, border_fill_alpha=0,
        outline_line_color=None, **more,
    )  # fmt: skip
    plot.toolbar.logo = None
    plot.grid.grid_line_alpha = 0.3
    for part in (plot.title, *plot.axis):
        for name in ("text_color", "axis_label_text_color", "major_label_text_color"):
            if name in part.properties():
                setattr(part, name, _INK)
    return plot


def _legend(plot: Any) -> None:
    for legend in plot.legend:
        legend.click_policy, legend.background_fill_alpha, legend.label_text_color = "hide", 0, _INK
        legend.border_line_alpha, legend.label_text_font_size = 0, "10px"
        legend.ncols, legend.nrows = 4, "auto"
        plot.add_layout(legend, "below")


def _style(css: str) -> Any:
    return models.InlineStyleSheet(css=css)


def data_table(name: str, source: Any, columns: Sequence[tuple[str, str, str]], **more: Any) -> list[Any]:
    """A sortable table of (column, title, format), and a button that gives it as CSV; an empty format is text."""
    shown = []
    for field, title, form in columns:
        formatter = widgets.NumberFormatter(format=form, nan_format="-") if form else widgets.StringFormatter()
        longest = 0 if form else max((len(str(text)) for text in source.data[field]), default=0)
        width = min(320, max(90, 8 * longest))
        shown.append(widgets.TableColumn(field=field, title=title, formatter=formatter, width=width))
    table = widgets.DataTable(
        source=source, columns=shown, height=min(300, 32 + 25 * len(source.data[columns[0][0]])), index_position=None,
        sizing_mode="stretch_width", name=f"table-{name}", reorderable=False, stylesheets=[_style(_TABLE_STYLE)],
        **more,
    )  # fmt: skip
    button = models.Button(label="CSV", width=80, name=f"csv-{name}", stylesheets=[_style(_INPUT_STYLE)])
    button.js_on_click(models.CustomJS(args={"source": source, "file": f"{name}.csv"}, code=_CSV))
    return [table, button]


def _source(table: "pl.DataFrame", **more: Any) -> Any:
    columns = {
        name: table[name].to_numpy() if table[name].dtype.is_numeric() else table[name].to_list()
        for name in table.columns
    }
    return models.ColumnDataSource({**columns, **more})


def join(drawn: Sequence[Any]) -> None:
    """A cell that is chosen in one figure or table is marked in the others."""
    tables = [table for model in drawn for table in model.select({"type": widgets.DataTable})]
    sources = [table.source for table in tables if "_cell" in table.source.data]
    for one in sources:
        for other in sources:
            if one is not other:
                mark = models.CustomJS(args={"from": one, "to": other}, code=_JOIN)
                one.selected.js_on_change("indices", mark)


def impact(found: Found) -> Any:
    """Step 1: accuracy, memory and synaptic operations over the kernel, means and single seeds."""
    import polars as pl

    table = found.tables["impact"]
    means = table.group_by("kernel", maintain_order=True).agg(
        (100 * pl.col("accuracy").mean()).alias("accuracy"),
        (100 * pl.col("accuracy").std()).fill_null(0.0).alias("sd"),
        pl.len().alias("seeds"),
        pl.col("parameters").first(),
        (pl.col("memory_bytes").first() / 1024).alias("kib"),
        (pl.col("synops").mean() / 1e6).alias("msynops"),
        pl.col("energy_nj").mean(),
    )
    names = list(map(kernel_text, means["kernel"].to_list()))
    source = _source(means.with_columns(pl.Series("shown", names)), low=(means["accuracy"] - means["sd"]).to_numpy(),
                     high=(means["accuracy"] + means["sd"]).to_numpy())  # fmt: skip
    plots = []
    for label, field, colour in (
        ("validation accuracy (%)", "accuracy", BLUE), ("memory (KiB)", "kib", GREEN),
        ("synaptic operations an image (millions)", "msynops", RED),
    ):  # fmt: skip
        plot = _figure(label, "every convolution", label, x_range=models.FactorRange(*names), min_width=240)
        plot.vbar(x="shown", top=field, width=0.6, source=source, color=colour, alpha=0.8)
        if field == "accuracy":
            plot.add_layout(models.Whisker(base="shown", lower="low", upper="high", source=source, line_color=_INK))
            plot.y_range.start = max(0.0, float((means["accuracy"] - means["sd"]).min()) - 5)  # pyright: ignore
        plot.add_tools(
            models.HoverTool(tooltips=[("kernel", "@shown"), (label, f"@{field}{{0.00}}"), ("seeds", "@seeds")])
        )
        plots.append(plot)
    columns = (
        ("shown", "kernel", ""), ("accuracy", "validation %", "0.00"), ("sd", "sd", "0.00"), ("seeds", "seeds", "0"),
        ("parameters", "parameters", "0,0"), ("kib", "memory KiB", "0.0"), ("msynops", "synops, millions", "0.000"),
        ("energy_nj", "energy nJ", "0"),
    )  # fmt: skip
    return column(row(*plots, sizing_mode="stretch_width", styles=_WRAP), *data_table("impact", source, columns),
                  sizing_mode="stretch_width")  # fmt: skip


def search(found: Found) -> Any:
    """Step 3: every scored cell, score over memory; filters, and a table of the same selection."""
    import polars as pl

    table = found.tables["search"].unique("genotype", keep="first", maintain_order=True)
    fidelities = table["fidelity"].unique(maintain_order=True).to_list()
    # Scores of different fidelities do not compare: the one that most cells have is drawn.
    most = max(fidelities, key=lambda name: (table["fidelity"] == name).sum())
    table = table.filter(pl.col("fidelity") == most).with_columns((pl.col("memory_bytes") / 1024).alias("kib"))
    shown = table.select(
        "genotype", "kernel_set", pl.col("score").cast(pl.Float32), pl.col("score_se_paired").cast(pl.Float32),
        pl.col("search_validation").cast(pl.Float32) * 100, pl.col("kib").cast(pl.Float32),
        pl.col("conv_edges").cast(pl.Int32), "fits", "finalist",
    )  # fmt: skip
    cells = shown["genotype"].to_list()
    source = _source(shown, _cell=found.functions(cells), most=(found.most_synops(cells) / 1e6).astype(np.float32))
    sets = shown["kernel_set"].unique(maintain_order=True).to_list()
    sizes = sorted({int(k) for k in re.findall(r"conv(\d+)", " ".join(cells))})
    deepest = int(shown["conv_edges"].to_numpy().max(initial=1))
    controls = {
        "set": models.Select(title="kernel set", value="all", options=["all", *sets], width=120, name="set"),
        "size": models.Select(title="kernel size", value="all", options=["all", *map(str, sizes)], width=120,
                              name="size"),
        "depth": models.RangeSlider(title="convolutions in a cell", start=0, end=max(1, deepest), step=1,
                                    value=(0, max(1, deepest)), width=200, name="depth"),
        "fits": models.Toggle(label="only those within the budget", active=False, width=200, name="fits"),
        "text": models.TextInput(title="genotype has", width=180, name="text"),
    }  # fmt: skip
    for control in controls.values():
        control.stylesheets = [_style(_INPUT_STYLE)]
    view = models.CDSView(filter=models.CustomJSFilter(args=controls, code=_FILTER))
    again = models.CustomJS(args={"filter": view.filter}, code=_AGAIN)
    for name, control in controls.items():
        control.js_on_change("active" if name == "fits" else "value", again)
    plot = _figure(f"{shown.height:,} distinct cells, {most} fidelity", "memory (KiB), counted", f"{most} score",
                   output_backend="webgl", x_axis_type="log", name="figure-cells")  # fmt: skip
    for colour, own in zip(cycle(COLOURS), sets, strict=False):
        only = models.GroupFilter(column_name="kernel_set", group=own)
        both = models.CDSView(filter=models.IntersectionFilter(operands=[only, view.filter]))
        drawn = plot.scatter(
            "kib", "score", source=source, view=both, color=colour, size=4, alpha=0.5, legend_label=own
        )
        at = {"x": "kib", "y": "score"}
        drawn.selection_glyph = models.Scatter(**at, size=12, fill_color=colour, line_color=_INK, line_width=2)
        drawn.nonselection_glyph = models.Scatter(**at, size=4, fill_color=colour, line_color=None, fill_alpha=0.25)
    winners = models.CDSView(filter=models.BooleanFilter(shown["finalist"].to_list()))
    plot.scatter("kib", "score", source=source, view=winners, size=13, fill_alpha=0, line_color=_INK, line_width=2,
                 legend_label="finalists")  # fmt: skip
    tips = [("cell", "@genotype"), ("score", "@score{0.000} ± @score_se_paired{0.000} (paired)"), ("KiB", "@kib{0.0}"),
            ("synaptic operations, if all fire", "@most{0.000} M"), ("convolutions", "@conv_edges"),
            ("after short training", "@search_validation{0.0} %")]  # fmt: skip
    plot.add_tools(models.HoverTool(tooltips=tips), models.TapTool())
    _legend(plot)
    columns = (
        ("genotype", "cell", ""), ("kernel_set", "set", ""), ("score", "score", "0.000"),
        ("score_se_paired", "paired SE", "0.000"), ("search_validation", "short training %", "0.0"),
        ("kib", "KiB", "0.0"), ("most", "synops at most, millions", "0.000"), ("conv_edges", "convolutions", "0"),
    )  # fmt: skip
    return column(
        row(*controls.values(), styles=_WRAP), plot, *data_table("cells", source, columns, view=view),
        sizing_mode="stretch_width",
    )  # fmt: skip


def tradeoff(found: Found) -> Any:
    """Step 4: accuracy over memory, with the budget as a slider; width of weights and device are choices."""
    import polars as pl

    table = found.tables["tradeoff"].with_columns(
        (100 * pl.col("validation_accuracy")).alias("validation"), (100 * pl.col("test_accuracy")).alias("test"),
        (100 * pl.col("test_sd")).alias("sd"), (pl.col("memory_bytes") / 1024).alias("kib"),
    )  # fmt: skip
    shown = table.select("name", "role", "kernel_set", "genotype", "n", "validation", "test", "sd", "kib", "parameters",
                         (pl.col("synops") / 1e6).alias("msynops"), "energy_nj", "on_front", "chosen")  # fmt: skip
    counted = int(found.summary.get("chosen", {}).get("bits", 8))
    memory = found.memory(table["genotype"].to_list()) or {counted: table["memory_bytes"].to_numpy()}
    of_widths = {f"_bytes{bits}": own.astype(np.float64) for bits, own in memory.items()}
    source = _source(shown, _cell=found.functions(shown["genotype"].to_list()), **of_widths)
    kib = shown["kib"].to_numpy()
    start = float(found.summary.get("chosen", {}).get("memory_budget_bytes") or 1024 * kib.max()) / 1024
    largest = math.ceil(max(own.max() for own in memory.values()) / 1024)  # a run without a limit has a vast budget
    budget = models.Slider(title="memory budget (KiB)", start=1, end=largest, step=0.5, value=min(start, largest),
                           sizing_mode="stretch_width", name="budget")  # fmt: skip
    choices = [str(bits) for bits in memory]
    width = models.Select(title="bits of weights and membranes", value=str(counted), options=choices, width=200,
                          stylesheets=[_style(_INPUT_STYLE)],
                          name="width")  # fmt: skip
    limits = found.broken(table["genotype"].to_list())
    device = models.Select(title="device", value=_ANY, options=[_ANY, *limits], width=200,
                           stylesheets=[_style(_INPUT_STYLE)], name="device")  # fmt: skip
    plot = _figure(
        "accuracy over memory",
        "memory (KiB), counted",
        "accuracy (%) in float32: filled validation, open test",
        name="figure-tradeoff",
    )
    plot.segment("kib", "validation", "kib", "test", source=source, color=GREY)
    roles = shown["role"].unique(maintain_order=True).to_list()
    for colour, marker, role in zip(cycle(COLOURS), cycle(_MARKERS), roles, strict=False):
        view = models.CDSView(filter=models.GroupFilter(column_name="role", group=role))
        look = {"source": source, "view": view, "marker": marker, "line_color": colour, "legend_label": role}
        plot.scatter("kib", "validation", size=11, fill_color=colour, **look)
        plot.scatter("kib", "test", size=7, fill_alpha=0, **look)
    line = models.Span(location=budget.value, dimension="height", line_color=ORANGE, line_width=2)
    plot.add_layout(line)
    chosen = shown.filter(pl.col("chosen"))
    pick = models.ColumnDataSource({"kib": chosen["kib"].to_list(), "validation": chosen["validation"].to_list()})
    plot.scatter("kib", "validation", source=pick, size=22, fill_alpha=0, line_color=_INK, line_width=3)
    tips = [("name", "@name (@role)"), ("cell", "@genotype"), ("validation", "@validation{0.00} %"),
            ("test", "@test{0.00} ± @sd{0.00} %, n = @n"), ("KiB", "@kib{0.0}"),
            ("energy", "@energy_nj{0} nJ")]  # fmt: skip
    plot.add_tools(models.HoverTool(tooltips=tips), models.TapTool())
    _legend(plot)
    answer = models.PreText(text="", name="pick", sizing_mode="stretch_width",
                            styles={"white-space": "pre-wrap", "color": "inherit"})  # fmt: skip
    args = {"source": source, "budget": budget, "width": width, "line": line, "pick": pick, "answer": answer,
            "device": device, "any": _ANY, "limits": json.dumps(limits)}  # fmt: skip
    move = models.CustomJS(args=args, code=_BUDGET)
    budget.js_on_change("value", move)
    width.js_on_change("value", move)
    device.js_on_change("value", move)
    columns = (
        ("name", "name", ""), ("role", "role", ""), ("genotype", "cell", ""), ("n", "n", "0"),
        ("validation", "validation %", "0.00"), ("test", "test %", "0.00"), ("sd", "sd", "0.00"), ("kib", "KiB", "0.0"),
        ("parameters", "parameters", "0,0"), ("msynops", "synops, millions", "0.000"), ("energy_nj", "energy nJ", "0"),
    )  # fmt: skip
    return column(row(budget, width, device, sizing_mode="stretch_width", styles=_WRAP), answer, plot,
                  *data_table("tradeoff", source, columns), sizing_mode="stretch_width")  # fmt: skip


def curves(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Validation accuracy of every training by epoch; a click on its name hides it."""
    plot = _figure("validation accuracy", "epoch", "validation accuracy (%)")
    for colour, (name, lines) in zip(cycle(COLOURS), records.items(), strict=False):
        source = models.ColumnDataSource({
            "epoch": [line["epoch"] for line in lines],
            "accuracy": [100 * line["validation_accuracy"] for line in lines],
            "name": [name] * len(lines),
        })  # fmt: skip
        plot.line("epoch", "accuracy", source=source, color=colour, alpha=0.8, legend_label=name)
        plot.scatter("epoch", "accuracy", source=source, color=colour, size=5, legend_label=name)
    plot.add_tools(models.HoverTool(tooltips=[("training", "@name"), ("epoch", "@epoch"), ("%", "@accuracy{0.00}")]))
    _legend(plot)
    plot.legend.visible = len(records) <= _MOST_NAMES
    return plot


def whole(name: str, table: "pl.DataFrame") -> Any:
    """All of a table, sortable, with a filter and as CSV."""
    import polars as pl

    texts = [column for column in table.columns if not table[column].dtype.is_numeric()]
    shown = table.with_columns(
        pl.Series(column, ["" if value is None else str(value) for value in table[column]]) for column in texts
    )
    source = _source(shown)
    text = models.TextInput(title="rows that have", width=180, name=f"text-{name}", stylesheets=[_style(_INPUT_STYLE)])
    view = models.CDSView(filter=models.CustomJSFilter(args={"text": text}, code=_HAVING))
    text.js_on_change("value", models.CustomJS(args={"filter": view.filter}, code=_AGAIN))
    columns = [(column, column, "" if column in texts else "0,0.[0000]") for column in table.columns]
    wide = "none" if len(columns) > _MOST_COLUMNS else "force_fit"  # it scrolls
    return column(text, *data_table(name, source, columns, view=view, autosize_mode=wide), sizing_mode="stretch_width")


def activity(found: Found) -> Any:
    """Spikes of one image through the layers over time, and each layer's firing rate."""
    table = found.tables["activity"]
    sites = table["site"].unique(maintain_order=True).to_list()
    source = models.ColumnDataSource({
        "site": table["site"].to_list(),
        "step": [str(step + 1) for step in table["time_step"].to_list()],
        "share": (100 * table["spikes"] / table["neurons"]).to_numpy(),
        "spikes": table["spikes"].to_numpy(),
        "rate": (100 * table["rate"]).to_numpy(),
    })  # fmt: skip
    steps = list(dict.fromkeys(source.data["step"]))
    plot = _figure("neurons that fire (%)", "time step", "layer", x_range=models.FactorRange(*steps),
                   y_range=models.FactorRange(*reversed(sites)))  # fmt: skip
    colours = models.LinearColorMapper(palette="Cividis256", low=0, high=max(1e-9, float(np.max(source.data["share"]))))
    plot.rect("step", "site", 1, 1, source=source, fill_color={"field": "share", "transform": colours}, line_color=None)
    bar = models.ColorBar(color_mapper=colours, background_fill_alpha=0, major_label_text_color=_INK)
    plot.add_layout(bar, "right")
    plot.add_tools(models.HoverTool(tooltips=[
        ("layer", "@site"), ("time step", "@step"), ("fire", "@share{0.0} % (@spikes spikes)"),
        ("mean of images and time", "@rate{0.00} %"),
    ]))  # fmt: skip
    return plot
