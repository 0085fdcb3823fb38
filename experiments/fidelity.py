"""How small a network ranks cells as the full-size one does: Kendall's tau against cost.

    python experiments/fidelity.py --data-dir DIR          # CIFAR-10, 320 cells, about 40 minutes on 2 cores

Scores a sample of cells from the union of the six kernel sets at full size with many seeds (the reference),
and at many smaller sizes with draws of their own. Leaves tables/fidelity.parquet, figures/fidelity.png and
report.md in the run folder. Killed, it goes on where it was; `timing/` is measured anew when it is removed.
"""

import dataclasses
import itertools
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from scipy import stats

from spikernel_jax.cells.space import CellSpace
from spikernel_jax.data import Dataset, dataset_info, load_dataset
from spikernel_jax.io.store import ResultStore
from spikernel_jax.pipeline import cli
from spikernel_jax.pipeline.job import open_folder
from spikernel_jax.report import pages, search_figures
from spikernel_jax.scoring.bank import make_bank
from spikernel_jax.scoring.fidelity import Fidelity
from spikernel_jax.scoring.scorer import PRECISIONS, Scorer
from spikernel_jax.snn.spec import NetworkSpec, spec_to_json

if TYPE_CHECKING:
    import polars as pl

SIZES = (1, 3, 5, 7)
ONE_SMALLER = (("batch", 16), ("time_steps", 2), ("side", 16), ("side", 8))
SMALL = (  # C, B, T, side
    (4, 16, 2, 16), (4, 64, 2, 16),
    (8, 16, 1, 16), (8, 16, 2, 8), (8, 16, 2, 16), (8, 16, 5, 16),
    (8, 32, 1, 16), (8, 32, 2, 8), (8, 32, 2, 16), (8, 32, 2, None), (8, 32, 5, 16),
    (8, 64, 1, 16), (8, 64, 2, 8), (8, 64, 2, 16), (8, 64, 5, 16), (8, 64, 5, None),
    (16, 32, 1, 16), (16, 32, 2, 8), (16, 32, 2, 16), (16, 32, 5, 16),
    (16, 64, 1, 16), (16, 64, 2, 8), (16, 64, 2, 16), (16, 64, 5, 16), (16, 64, 5, None),
)  # fmt: skip
_HALF_SIZE = Fidelity(16, 32, 5, 16, 2)  # where bfloat16 is compared with float32
PART = 64  # cells that are scored, and timed, in one call


@dataclasses.dataclass(frozen=True)
class Options(cli.OutputOptions):
    """Options of the study."""

    data: str = "cifar10"
    """Data set."""
    data_dir: Path | None = None
    """Where prepared data lie; default the environment's TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    out: Path = Path("runs/fidelity-cifar10")
    """Run folder."""
    cells: int = 320
    """Cells sampled from the union of the six kernel sets."""
    channels: int = 32
    """Width C of the full-size network."""
    time_steps: int = 5
    """T of the full-size network."""
    batch: int = 64
    """Images B of a full-size batch."""
    reference_seeds: int = 8
    """Replicates of the reference."""
    seeds: int = 4
    """Replicates of every other setting; fewer are read off them."""
    limit_train: int = 10_000
    """Training images to draw batches from."""
    seed: int = 0
    """Seed of everything random."""


def settings(o: Options) -> list[Fidelity]:
    """Full size with one factor changed, and the small sizes; none is larger than full size.

    Full size itself is read off the reference's own replicates.
    """
    full = Fidelity(o.channels, o.batch, o.time_steps, None, o.seeds)
    own = [dataclasses.replace(full, **{name: value}) for name, value in ONE_SMALLER]
    return own + [Fidelity(min(c, o.channels), b, min(t, o.time_steps), side, o.seeds) for c, b, t, side in SMALL]


def name(f: Fidelity) -> str:
    """A folder's name for a setting."""
    return f"C{f.channels}-B{f.batch}-T{f.time_steps}-S{f.side or 'full'}"


def scorer(f: Fidelity, spec: NetworkSpec, data: Dataset, key: jax.Array, precision: str | None = None) -> Scorer:
    """Scores cells at one setting; bank and images by the setting's own key."""
    weights, images = jax.random.split(key)
    network = f.network(spec)
    bank = make_bank(weights, network, f.seeds)
    return Scorer(bank, f.images(images, data, spec), network, precision=precision, chunk=PART)


def precision_tau(
    f: Fidelity, spec: NetworkSpec, data: Dataset, key: jax.Array, rows: np.ndarray, folder: Path
) -> float:
    """Kendall's tau of the ranking in bfloat16 with that in float32, same weights and images."""
    found = []
    for precision in PRECISIONS:
        fingerprint = {"spec": spec_to_json(f.network(spec)), "precision": precision, "rows": len(rows)}
        store = ResultStore(folder / f"{precision}-{name(f)}", fingerprint)
        found.append(score(scorer(f, spec, data, key, precision), rows, store).mean(1))
    return kendall(*found)


def score(s: Scorer, rows: np.ndarray, store: ResultStore) -> np.ndarray:
    """Scores [n, R] of rows, a replicate at a time on disk."""
    order = s.order(rows)
    parts = [order[i : i + PART] for i in range(0, len(rows), PART)]
    for r in sorted(set(range(s.seeds)) - store.done()):
        scores = np.zeros(len(rows))
        for i in range(0, len(parts), s.lanes):
            together = parts[i : i + s.lanes]
            for part, result in zip(together, s.submit(r, [rows[p] for p in together])(), strict=True):
                scores[part] = result["scores"]
        store.save(r, scores=scores)
    return np.stack([store.load(r)["scores"] for r in range(s.seeds)], 1)


def seconds_a_cell(s: Scorer, rows: np.ndarray) -> float:
    """Best of three calls on all lanes, compilation apart; whole groups, as in a ranking."""
    parts = [rows[lane * PART : (lane + 1) * PART] for lane in range(s.lanes)]
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        s.submit(0, parts)()
        taken.append(time.perf_counter() - began)
    return min(taken[1:]) / sum(map(len, parts))


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b."""
    tau, _ = stats.kendalltau(a, b)
    return float(tau)  # pyright: ignore[reportArgumentType]


def agreement(scores: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How a ranking agrees with the reference's."""
    top = max(1, len(reference) // 10)
    best, ours = np.argsort(-reference)[:top], np.argsort(-scores)[:top]
    standing = np.argsort(np.argsort(-reference))
    upper = reference >= np.median(reference)
    return {
        "tau": kendall(scores, reference),
        "tau_top_half": kendall(scores[upper], reference[upper]),
        "top_tenth_overlap": len(set(best) & set(ours)) / top,
        "rank_of_best": float(standing[ours[0]] + 1),
    }


def study(o: Options) -> "pl.DataFrame":
    """Measures every setting, and returns those on the front."""
    import polars as pl

    space, info = CellSpace(SIZES), dataset_info(o.data)
    spec = NetworkSpec(info.image_shape, info.num_classes, space, channels=o.channels, time_steps=o.time_steps)
    data = load_dataset(o.data, o.data_dir, limit_train=o.limit_train)
    apart = {"data_dir", "out", *(field.name for field in dataclasses.fields(cli.OutputOptions))}
    config = {field.name: getattr(o, field.name) for field in dataclasses.fields(o) if field.name not in apart}
    run = open_folder(o.out, config, data, cli.say)
    sets = itertools.combinations(SIZES, 2)
    union = np.unique(np.concatenate([space.convert(own.enumerate(), own) for own in map(CellSpace, sets)]), axis=0)
    rng = np.random.default_rng(o.seed)
    rows = union[np.sort(rng.choice(len(union), o.cells, replace=False))]
    key = jax.random.key(o.seed)
    every = [Fidelity(o.channels, o.batch, o.time_steps, None, o.reference_seeds), *settings(o)]
    with run.lock():
        found, seconds, timing = [], [], run.folder("timing")
        for index, f in enumerate(every):
            label = ("reference-" if index == 0 else "") + name(f)
            own = scorer(f, spec, data, jax.random.fold_in(key, zlib.crc32(label.encode()) if index else 0))
            fingerprint = {"spec": spec_to_json(f.network(spec)), "config": config, "precision": own.precision}
            began = time.perf_counter()
            found.append(score(own, rows, ResultStore(run.folder("scores") / label, fingerprint)))
            if not (timed := ResultStore(timing / label, fingerprint)).done():
                ordered = union[own.order(union)]
                start = len(ordered) // 3
                timed.save(0, seconds=seconds_a_cell(own, ordered[start : start + PART * own.lanes]))
            seconds.append(float(timed.load(0)["seconds"]))
            cli.say(f"{index + 1}/{len(every)}  {label}  {time.perf_counter() - began:.0f} s")
        in_bfloat16 = precision_tau(_HALF_SIZE, spec, data, key, rows, run.folder("scores"))
        half = o.reference_seeds // 2
        # Full size is compared with the reference's other replicates, all else with the whole reference.
        references = [found[0][:, half:].mean(1)] + [found[0].mean(1)] * (len(every) - 1)
        table = []
        for f, scores, cost, reference in zip(every, found, seconds, references, strict=True):
            seeds = half if f is every[0] else o.seeds
            for r in sorted({1, 2, seeds}):
                groups = [scores[:, i : i + r].mean(1) for i in range(0, seeds - r + 1, r)]
                each = [agreement(group, reference) for group in groups]
                table.append({
                    "channels": f.channels, "batch": f.batch, "time_steps": f.time_steps,
                    "side": f.side or min(spec.cell_size(0)), "seeds": r, "ms_a_cell": 1000 * cost * r,
                    **{measure: float(np.mean([e[measure] for e in each])) for measure in each[0]}, "draws": len(each),
                })  # fmt: skip
        frame = pl.DataFrame(table).sort("ms_a_cell")
        best = np.maximum.accumulate(frame["tau"].to_numpy())
        frame = frame.with_columns(pl.Series("on_front", (frame["tau"].to_numpy() >= best)))
        run.write_table("fidelity", frame)
        size = f"C = {o.channels}, B = {o.batch}, T = {o.time_steps}, R = {o.reference_seeds}"
        title = f"{o.data}, {o.cells} cells, reference {size}"
        search_figures.fidelity_figure(frame, run.folder("figures") / "fidelity.png", title)
        front = frame.filter(pl.col("on_front"))
        run.update_summary(bfloat16_tau=in_bfloat16, front=front.to_dicts())
        pages.write_report(run, [
            ("Run", f"{data.source}\n\n{title}, seed {o.seed}. Full size (C = {o.channels}, B = {o.batch}, "
                    f"T = {o.time_steps}) is compared with the reference's other {o.reference_seeds - half} "
                    f"replicates, all else with the whole reference. Convolutions and Gram matrices in bfloat16 "
                    f"against float32, {name(_HALF_SIZE)}, same draws: Kendall's tau {in_bfloat16:.4f}."),
            ("Pareto front", pages.markdown_table(front, frame.columns)),
            ("All settings", pages.markdown_table(frame, frame.columns)),
        ])  # fmt: skip
    return front


def print_front(front: "pl.DataFrame") -> None:
    """Prints the settings worth taking."""
    cli.show(pages.markdown_table(front, front.columns))


if __name__ == "__main__":
    cli.main(Options, lambda options: print_front(study(options)), __doc__ or "")
