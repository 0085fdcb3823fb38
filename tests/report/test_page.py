"""The page of a run: what it holds, what it says is missing, and that a browser can be used on it."""

import base64
import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import scripts
from spikernel_jax.cells.space import CellSpace
from spikernel_jax.io.run_folder import RunFolder
from spikernel_jax.pipeline.presets import get_preset
from spikernel_jax.report import page as page_module
from spikernel_jax.report import pages
from spikernel_jax.report.found import find
from spikernel_jax.report.page import write_page
from spikernel_jax.report.steps import cell_drawing
from spikernel_jax.snn import devices
from spikernel_jax.snn.cost import costs, most_synaptic_operations

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "report.py"
SPACE = CellSpace((1, 3))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CELLS = ("0>1:conv1 0>3:skip 1>3:conv1", "0>1:conv3 0>3:skip 1>3:conv1", "0>1:conv3 0>3:skip 1>3:conv3")
EVIL = "</script><img src=x onerror=alert(1)>"


def search_table(rows: np.ndarray, memory: np.ndarray) -> pl.DataFrame:
    rng, n = np.random.default_rng(0), len(rows)
    return pl.DataFrame({
        "kernel_set": rng.choice(["1", "3", "1,3"], n), "genotype": [SPACE.explicit(row) for row in rows],
        "score": rng.normal(size=n), "score_se_paired": np.full(n, 0.1), "fidelity": ["low"] * n,
        "search_epochs": [4] + [0] * (n - 1), "search_validation": [0.5] + [np.nan] * (n - 1),
        "conv_edges": (rows >= 2).sum(1), "memory_bytes": memory, "fits": memory < np.median(memory),
        "finalist": [True] + [False] * (n - 1),
    })  # fmt: skip


def make_run(path: Path, name: str = "k1") -> RunFolder:
    """A run as the four steps leave it, of made-up numbers; its first finalist has the given name."""
    preset = get_preset("mnist5k", "smoke")
    config = {"data": "mnist5k", "preset": "smoke", "seed": 0, "settings": dataclasses.asdict(preset),
              "images": {"train": 64, "validation": 32, "test": 32}}  # fmt: skip
    run = RunFolder.create(path, config)
    spec = preset.network("mnist5k", SPACE)
    rows = np.stack([SPACE.parse(cell) for cell in CELLS])
    memory = costs(spec, rows, 8).memory_bytes
    run.write_table("impact", pl.DataFrame({
        "kernel": ["1", "1", "3", "3"], "seed": [0, 1, 0, 1], "accuracy": [0.5, 0.6, 0.7, 0.7],
        "parameters": [10, 10, 20, 20], "memory_bytes": [1024, 1024, 2048, 2048], "synops": [1e6, 2e6, 3e6, 3e6],
        "energy_nj": [1.0, 1.0, 2.0, 2.0],
    }))  # fmt: skip
    cells = SPACE.enumerate()
    run.write_table("search", search_table(cells, costs(spec, cells, 8).memory_bytes))
    tradeoff = pl.DataFrame({
        "name": [name, "k3", "snasnet"], "role": ["finalist", "finalist", "published"], "kernel_set": ["1", "3", "1,3"],
        "genotype": CELLS, "n": [2, 2, 2], "validation_accuracy": [0.6, 0.7, 0.8], "test_accuracy": [0.61, 0.69, 0.79],
        "test_sd": [0.01, 0.01, 0.01], "parameters": [10, 20, 30], "synops": [1e6, 2e6, 3e6],
        "energy_nj": [1.0, 2.0, 3.0], "memory_bytes": memory, "on_front": [True, True, False],
        "chosen": [False, True, False],
    })  # fmt: skip
    run.write_table("tradeoff", tradeoff)
    run.write_table("activity", pl.DataFrame({
        "site": ["cell1.node0", "cell1.node0", "last", "last"], "time_step": [0, 1, 0, 1],
        "spikes": [5.0, 3.0, 1.0, 0.0], "neurons": [10, 10, 4, 4], "rate": [0.4, 0.4, 0.125, 0.125], "images": [32] * 4,
    }))  # fmt: skip
    run.update_summary(
        chosen={"name": "k3", "genotype": CELLS[1], "seeds": 2, "validation_accuracy": 0.7, "test_accuracy": 0.69,
                "test_accuracy_sd": 0.01, "parameters": 20, "memory_bytes": int(memory[1]), "bits": 8,
                "memory_budget_bytes": int(memory[1]) + 100},
        search_helped={"text": "**No gain is shown.** <i>0</i> points"},
        kernel_sets=[{"set": [1], "kept": True, "reason": "rule"}, {"set": [3], "kept": False, "reason": EVIL}],
        seconds={"impact": 1.5},
    )  # fmt: skip
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_page([make_run(tmp_path_factory.mktemp("page") / "run", EVIL).path])


def test_it_opens_with_the_answer_and_has_every_step(page):
    text = page.read_text("utf-8")
    assert page.name == "report.html"
    answer = text[text.index("<h1>") : text.index("Step 1")]
    for words in (
        "Chosen: <b>k3</b>",
        "69.00 ± 1.00 %",
        "n = 2 trainings: mean ± sd, 95 % [60.02, 77.98]",
        "<b>No gain is shown.</b>",
        "32.1 %",
        "<svg",
    ):
        assert words in answer, words  # the rate is (0.4·10 + 0.125·4) / 14
    order = [text.index(f">{heading}</h2>") for heading in (
        "Step 1: impact of the kernel", "Step 2: kernel sets", "Step 3: search", "Step 4: trade-off",
        "Spikes of one image", "What was run",
    )]  # fmt: skip
    assert order == sorted(order)
    assert "a short training of 4 epochs: 50.0 % of validation images" in text


def test_what_comes_from_a_run_is_escaped_and_nothing_is_fetched(page):
    text = page.read_text("utf-8")
    assert EVIL not in text
    assert "<i>0</i>" not in text
    assert "&lt;i&gt;0&lt;/i&gt;" in text
    own = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", own)
    assert "default-src 'none'" in own


def test_a_partial_run_says_what_is_missing(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("tradeoff", "activity"):
        (run.path / "tables" / f"{name}.parquet").unlink()
    (run.path / "summary.json").unlink()
    text = write_page([run.path]).read_text("utf-8")
    assert "No model has been chosen yet" in text
    assert "run experiments/tradeoff.py --out" in text
    assert "Step 3: search" in text
    assert find(run.path).tables.keys() == {"impact", "search"}


def test_a_damaged_table_is_named_and_not_drawn(tmp_path):
    run = make_run(tmp_path / "run")
    table = run.path / "tables" / "impact.parquet"
    table.write_bytes(table.read_bytes()[:-7])
    (run.path / "trainings" / "k1-seed0").mkdir(parents=True)
    (run.path / "trainings" / "k1-seed0" / "metrics.jsonl").write_text('{"epoch": 1')
    found = find(run.path)
    assert "impact" not in found.tables
    text = write_page([run.path]).read_text("utf-8")
    assert "impact.parquet is not as this run wrote it" in text
    assert "metrics.jsonl is damaged" in text


def test_all_distinct_cells_stay_below_five_megabytes(tmp_path):
    run = make_run(tmp_path / "run")
    rows = np.tile(SPACE.enumerate(), (20, 1))[:20_005]
    table = search_table(rows, np.arange(20_005) + 1000)
    # Different texts, or equal cells would be one point.
    run.write_table("search", table.with_columns(pl.col("genotype") + pl.int_range(len(rows)).cast(pl.String)))
    path = write_page([run.path])
    assert "20,005 distinct cells" in path.read_text("utf-8")
    assert path.stat().st_size < 5_000_000


def test_memory_of_other_widths_is_the_cost_models(page):
    found = find(page.parent)
    spec = get_preset("mnist5k", "smoke").network("mnist5k", SPACE)
    rows = np.stack([SPACE.parse(cell) for cell in CELLS])
    for bits, memory in found.memory(CELLS).items():
        np.testing.assert_array_equal(memory, costs(spec, rows, bits).memory_bytes)
    assert found.memory(["nonsense"]) == {}
    np.testing.assert_array_equal(found.most_synops(CELLS), most_synaptic_operations(spec, rows))
    assert np.isnan(found.most_synops(["nonsense"])).all()


def test_what_a_cell_breaks_of_each_device(page):
    found = find(page.parent)
    spec = get_preset("mnist5k", "smoke").network("mnist5k", SPACE)
    rows = [SPACE.parse(cell) for cell in CELLS]
    broken = found.broken(CELLS)
    assert list(broken) == list(devices.devices())
    for name, device in devices.devices().items():
        for bits in (2, 8):
            assert broken[name][bits] == ["; ".join(devices.broken(device, spec, row, bits)) for row in rows]
        assert broken[name][16] == ["C has weights of 2 to 8 bits"] * len(rows)
    assert found.broken(["nonsense"]) == {}


def test_a_cell_is_drawn_edge_by_edge():
    drawn = cell_drawing(CELLS[1])
    assert drawn.count('marker-end="url(#tip)"') == 3
    assert [name in drawn for name in (">conv3<", ">conv1<", ">skip<", ">avgpool<")] == [True, True, True, False]
    assert cell_drawing(EVIL) == f"<p>{EVIL.replace('<', '&lt;').replace('>', '&gt;')}</p>"


def test_the_script_makes_it_anew_and_lays_runs_side_by_side(tmp_path, capsys):
    runs = [make_run(tmp_path / name).path for name in ("one", "two")]
    scripts.start(SCRIPT, str(runs[0]))
    assert (runs[0] / "report.html").exists()
    both = tmp_path / "both.html"
    scripts.start(SCRIPT, *map(str, runs), "--out", str(both))
    text = both.read_text("utf-8")
    assert "one: Step 4: trade-off" in text
    assert "two: Step 4: trade-off" in text
    assert "2 runs: give --out" in scripts.refused(SCRIPT, capsys, *map(str, runs))
    assert "is not a folder" in scripts.refused(SCRIPT, capsys, str(tmp_path / "none"))


# Of another study


def make_study(path: Path) -> RunFolder:
    """A study's run: a table, a training, a figure and its report."""
    run = RunFolder.create(path, {"data": "mnist5k", "preset": "cpu", "seed": 3})
    run.write_table("compared", pl.DataFrame({
        "kernel": ["1x1", "3x3", EVIL], "seed": [0, 0, 1], "accuracy": [0.25, None, 0.75], "kept": [True, False, None],
    }))  # fmt: skip
    log = run.path / "trainings" / "k3-seed0"
    log.mkdir(parents=True)
    (log / "metrics.jsonl").write_text('{"epoch": 1, "validation_accuracy": 0.5}\n')
    (run.folder("figures") / "compared.png").write_bytes(b"PNG")
    text = (
        f"About {EVIL}\n\n| kernel | % |\n| --- | ---: |\n| 3x3 | **75.00** |\n\n![all](figures/compared.png)\n\n"
        "![elsewhere](../../secret.png) [no](javascript:alert(1))\n\n```sh\n## no heading\n```"
    )
    (path.parent.parent / "secret.png").write_bytes(b"SECRET")
    pages.write_report(run, [("Run", text), ("What came out", "nothing")])
    return run


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return make_study(tmp_path_factory.mktemp("study") / "runs" / "compared").path / "report.html"


def test_a_studys_page_is_its_report_with_figures_and_all_tables(study):
    text = study.read_text("utf-8")
    assert re.findall(r"<h1>(.*?)</h1>", text) == ["compared, mnist5k, cpu, seed 3"]
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
    assert headings == ["Run", "What came out", "Training", "Table: compared", "What was run"]
    assert "<strong>75.00</strong></td>" in text
    assert f'src="data:image/png;base64,{base64.b64encode(b"PNG").decode()}"' in text
    assert "## no heading" in text
    assert "k3-seed0" in text
    for never in (EVIL, base64.b64encode(b"SECRET").decode(), 'href="javascript'):
        assert never not in text
    again = write_page([study.parent])  # from the folder alone
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", again.read_text("utf-8")) == headings


def test_a_study_that_is_not_finished_or_damaged_says_so(tmp_path):
    run = make_study(tmp_path / "runs" / "one")
    (run.path / "report.md").unlink()
    table = run.path / "tables" / "compared.parquet"
    table.write_bytes(table.read_bytes()[:-7])
    text = write_page([run.path]).read_text("utf-8")
    assert "report.md is missing: the run is not finished" in text
    assert "compared.parquet is not as this run wrote it" in text
    assert "Step 1" not in text


def test_it_is_drawn_anew_only_of_other_files(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    drawn: list[Any] = []
    monkeypatch.setattr(page_module, "sections_of", lambda found: [])
    monkeypatch.setattr(page_module, "_render", lambda title, sections: drawn.append(title) or "Step")
    log = run.path / "training"
    log.mkdir()
    page = run.path / "report.html"
    changes = (
        lambda: None, lambda: page.write_text(page.read_text("utf-8").replace("Step", "Stop", 1), "utf-8"),
        lambda: run.update_summary(seconds={"search": 2.0}),
        lambda: (run.path / "report.md").write_text("x"),
        lambda: run.write_table("finalists", pl.DataFrame({"name": ["k3"]})), page.unlink,
        lambda: (log / "metrics.jsonl").write_text('{"epoch": 1, "validation_accuracy": 0.5}\n'),
        lambda: (run.folder("figures") / "a.png").write_bytes(b"PNG"), lambda: RunFolder.create(run.path, run.config),
    )  # fmt: skip
    for number, change in enumerate(changes, start=1):
        change()
        for _ in range(2):
            page_module.keep_page(run.path)
        assert len(drawn) == number


def test_tables_beyond_the_four_steps_own_are_on_the_page(tmp_path):
    run = make_run(tmp_path / "run")
    run.write_table("finalists", pl.DataFrame({"name": ["k3"], "seed": [0]}))
    assert ">Table: finalists</h2>" in write_page([run.path]).read_text("utf-8")


# In a browser


@pytest.fixture(scope="module")
def browser() -> Any:
    if CHROMIUM is None:
        pytest.skip("needs a browser: install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive the browser")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, page: Path, width: int, roots: int) -> tuple[Any, list[str], list[str]]:
    """The page in a tab, once it is drawn; errors of its console, and what it asks for."""
    tab = browser.new_page(viewport={"width": width, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_function(f"window.Bokeh && Bokeh.index.roots && Bokeh.index.roots.length >= {roots}")
    return tab, said, asked


def model(name: str) -> str:
    """A model of the page, as script."""
    return f"Bokeh.documents.map((d) => d.get_model_by_name('{name}')).find((m) => m)"


@pytest.mark.parametrize("width", [1440, 390])
def test_a_browser_renders_it_and_slider_and_click_do_what_they_say(width, page, browser):
    tab, said, asked = opened(browser, page, width, roots=4)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
    memory = find(page.parent).memory(CELLS)
    pick = lambda: tab.evaluate(f"{model('pick')}.text")  # noqa: E731
    tab.evaluate(f"{model('budget')}.value = {memory[8][0] / 1024 + 0.01}")  # holds the first alone
    assert pick().startswith(EVIL)  # as text
    tab.evaluate(f"{model('budget')}.value = {memory[8][1] / 1024 + 0.01}")
    assert pick().startswith("k3 fits")
    assert "validation 70.00 %" in pick()
    tab.evaluate(f"{model('width')}.value = '16'")  # twice the bytes
    assert "No finalist fits" in pick()
    tab.evaluate(f"{model('width')}.value = '8'")
    tab.evaluate(f"{model('device')}.value = 'cortex-m4'")
    assert pick().startswith("k3 fits cortex-m4 and ")
    tab.evaluate(f"{model('device')}.value = 'xylo'")
    reasons = find(page.parent).broken(CELLS)["xylo"][8]
    assert pick().startswith("No finalist fits xylo and ")
    assert f"k3: {reasons[1]}" in pick()
    tab.evaluate(f"{model('device')}.value = 'any'")
    table = f"{model('table-cells')}"
    shown = lambda: tab.evaluate(f"Array.from({table}.view.indices).length")  # noqa: E731
    everything = shown()
    tab.evaluate(f"{model('text')}.value = '0>1:conv3'")
    assert 0 < shown() < everything
    tab.evaluate(f"{model('text')}.value = ''")
    tab.evaluate(f"{model('size')}.value = '3'")
    cells = tab.evaluate(f"Array.from({table}.view.indices).map((i) => {table}.source.data.genotype[i])")
    assert len(cells) == sum("conv3" in cell for cell in tab.evaluate(f"Array.from({table}.source.data.genotype)"))
    assert all("conv3" in cell for cell in cells)
    tab.evaluate(f"{model('size')}.value = 'all'")
    # A click on the finalist k3 marks its cell in the other figure and in both tables.
    x, y = tab.evaluate(
        f"""(() => {{
          const plot = {model("figure-tradeoff")}, view = Bokeh.index.find_one(plot);
          view.el.scrollIntoView();
          const box = view.canvas_view.el.getBoundingClientRect();
          const source = {model("table-tradeoff")}.source.data;
          const to = view.frame;
          return [box.x + to.x_scale.compute(source.kib[1]), box.y + to.y_scale.compute(source.test[1])];
        }})()"""
    )
    tab.mouse.click(x, y)
    assert tab.evaluate(f"{model('table-tradeoff')}.source.selected.indices") == [1]
    (marked,) = tab.evaluate(f"{table}.source.selected.indices")
    cell = SPACE.parse(tab.evaluate(f"{table}.source.data.genotype[{marked}]"))
    np.testing.assert_array_equal(cell, SPACE.canonical(SPACE.parse(CELLS[1])[None])[0])
    # The slider itself, by its handle: the last of the page's.
    before = tab.evaluate(f"{model('budget')}.value")
    tab.locator(".noUi-handle").last.press("ArrowLeft")
    assert tab.evaluate(f"{model('budget')}.value") < before
    tab.wait_for_timeout(200)
    tab.screenshot(path=str(page.parent / f"{width}.png"), full_page=True)
    assert said == []
    assert asked == [page.as_uri()]
    tab.close()


@pytest.mark.parametrize("width", [1440, 390])
def test_a_browser_renders_a_studys_page_and_filters_its_table(width, study, browser):
    tab, said, asked = opened(browser, study, width, roots=2)
    table = model("table-compared")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(f"{table}.view.indices.count") == 3
    tab.evaluate(f"{model('text-compared')}.value = 'x3'")
    assert tab.evaluate(f"Array.from({table}.view.indices)") == [1]
    assert said == []
    pictures = {url[:15] for url in asked if url != study.as_uri()}
    assert pictures <= {"data:image/png;"}
    tab.close()
