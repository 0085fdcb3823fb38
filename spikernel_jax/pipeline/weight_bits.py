"""What bits of weights cost in accuracy and save in memory: a run's finalists, rounded, and trained on alike.

Every network is looked at as it was trained and after as many epochs more, with float weights and with each width, so
that what is trained for few bits stands beside a float network that was trained as long. Nothing is chosen here.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spikernel_jax.data import Split, load_dataset
from spikernel_jax.embedded import c, integer
from spikernel_jax.pipeline import fitting
from spikernel_jax.pipeline.fitting import Settings
from spikernel_jax.pipeline.job import Job
from spikernel_jax.pipeline.summary import write_summary_report
from spikernel_jax.report import device_figures
from spikernel_jax.snn.model import Model
from spikernel_jax.training.checkpoint import load_model
from spikernel_jax.training.evaluation import evaluate

if TYPE_CHECKING:
    import polars as pl

TABLE = "weight_bits"
_SAME = ("finalist", "genotype", "bits", "epochs", "width", "test")  # of a row, which is not made twice


def finalists(job: Job) -> dict[str, Model]:
    """Trained finalists of a run by name, of each genotype one.

    Raises:
      ValueError: if there are none.
    """
    rows = job.run.read_table("finalists", "experiments/train.py", ("name", "genotype"))
    names: dict[str, str] = {}
    for name, genotype in rows.select("name", "genotype").iter_rows():
        names.setdefault(genotype, name)
    return {name: load_model(job.run.path / "finalists" / name / "checkpoint") for name in names.values()}


class Tested(NamedTuple):
    """Images that no network of a run has been trained on, and whose they are."""

    name: str
    split: Split


def test_images(job: Job, name: str | None, data_dir: Path | None) -> Tested:
    """The test images of a data set of the run's kind; None takes the run's own.

    Raises:
      ValueError: if they are of another kind, or some are among those that the run trains on or chooses by.
    """
    own = job.data
    if name in (None, own.name):
        return Tested(own.name, own.test)
    other = load_dataset(str(name), data_dir)
    kinds = [(data.test.images.shape[1:], data.num_classes) for data in (other, own)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"--test {name}: {_kind(*kinds[0])}, where the run's {own.name} has {_kind(*kinds[1])}")
    seen = {image.tobytes() for split in (own.train, own.validation) for image in split.images}
    if known := sum(image.tobytes() in seen for image in other.test.images):
        raise ValueError(f"--test {name}: the run trains on or chooses by {known:,} of its test images")
    return Tested(other.name, other.test)


def _kind(shape: tuple[int, ...], classes: int) -> str:
    return f"images of {' x '.join(map(str, shape))} in {classes} classes"


def compare_bits(job: Job, settings: Settings, test: Tested) -> "pl.DataFrame":
    """Accuracies and bytes of every finalist at every width, rounded alone and trained on.

    Leaves ``tables/weight_bits.parquet``, which grows row by row and is gone on with when killed,
    ``figures/weight_bits.png``, and a section in ``report.md``.

    Args:
      job: of a run that has chosen a model.
      settings: how.
      test: of `test_images`.
    """
    import polars as pl

    models = finalists(job)
    done = {}
    if (job.run.path / "tables" / f"{TABLE}.parquet").exists():
        there = job.run.read_table(TABLE, "experiments/weight_bits.py", _SAME)
        done = {tuple(row[name] for name in _SAME): row for row in there.iter_rows(named=True)}
    rows = []
    for name, model in models.items():
        for bits in (0, *settings.widths):
            for epochs in (0, settings.tune) if settings.tune else (0,):
                same = (name, model.text, bits, epochs, settings.width, test.name)
                row = done.get(same) if bits or epochs else None
                if row is None:
                    row = _row(job, dict(zip(_SAME, same, strict=True)), model, test.split)
                    row |= {"test_images": len(test.split.labels)}
                    if same in done and done[same] != row:  # trained anew since: nothing of it is known
                        done = {own: row for own, row in done.items() if own[0] != name}
                rows.append(row)
                if same not in done:
                    job.run.write_table(TABLE, pl.DataFrame(rows))
                job.say(
                    f"  {name}  {f'int{bits}' if bits else 'float32'}{' trained on' * (epochs > 0)}: validation "
                    f"{100 * row['validation_accuracy']:.2f} %, test {100 * row['test_accuracy']:.2f} %"
                )
    table = pl.DataFrame(rows)
    job.run.write_table(TABLE, table)
    title = f"Finalists in integers, {test.name}, {len(test.split.labels):,} test images"
    device_figures.bits_figure(table, job.run.folder("figures") / f"{TABLE}.png", title)
    job.say(f"report: {write_summary_report(job)}")
    return table


def _row(job: Job, row: dict[str, Any], model: Model, test: Split) -> dict[str, Any]:
    if row["epochs"]:
        model = fitting.trained_on(job, row["finalist"], model, row["bits"], row["epochs"])
    if not row["bits"]:
        return row | {
            "validation_accuracy": evaluate(model, job.data.validation), "test_accuracy": evaluate(model, test),
            "constant_bytes": fitting.float_bytes(model), "written_bytes": None,
        }  # fmt: skip
    program = fitting.program_of(job, model, row["bits"], row["width"])
    found, source = fitting.rounded(job, model, program), c.generate(program)
    return row | {
        "validation_accuracy": found.accuracy,
        "test_accuracy": fitting.accuracy(integer.run(program, test.images), test),
        "constant_bytes": source.constant_bytes,
        "written_bytes": source.written_bytes,
    }
