"""A few hundred images of prepared CIFAR-10 for the tests, as TFDS holds them: ``tests/data/cifar10``.

Use: ``python tools/make_test_data.py --data-dir DIR``. Records are copied as they are: the first of each class.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from spikernel_jax.data import DATASETS
from spikernel_jax.pipeline import cli

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is copied, and where to."""

    data_dir: Path
    """Where prepared CIFAR-10 lies."""
    train: int = 320
    """Images of the training split, as many of each class."""
    test: int = 120
    """Images of the test split."""
    out: Path = ROOT / "tests" / "data"
    """Where the copy goes; an earlier one is replaced."""


def copy(options: Options) -> None:
    """Copies as many first records of each class, and says so in the copy's description."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    info = DATASETS["cifar10"]
    there, here = (folder / "cifar10" / info.version for folder in (options.data_dir, options.out))
    if not (there / "dataset_info.json").exists():
        raise ValueError(f"--data-dir {options.data_dir}: {there} holds no prepared data")
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    record = json.loads((there / "dataset_info.json").read_text())
    for split in record["splits"]:
        wanted = getattr(options, split["name"])
        name = f"cifar10-{split['name']}.array_record-00000-of-00001"
        source: Any = tfds.data_source("cifar10", split=split["name"], data_dir=options.data_dir, download=False)
        labels = np.array([record["label"] for record in source.__getitems__(list(range(4 * wanted)))])
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == k)[: wanted // 10] for k in range(10)]))
        records = ArrayRecordReader(str(there / name)).read(chosen.tolist())
        writer = ArrayRecordWriter(str(here / name), "group_size:1")
        for entry in records:
            writer.write(entry)
        writer.close()
        split |= {"numBytes": str(sum(map(len, records))), "shardLengths": [str(len(records))]}
    record["description"] += f" Here the first {options.train} and {options.test} of a JPEG copy, for tests."
    (here / "dataset_info.json").write_text(json.dumps(record, indent=2) + "\n")
    for name in ("features.json", "label.labels.txt"):
        shutil.copyfile(there / name, here / name)
    cli.say(f"{here}: {sum(path.stat().st_size for path in here.iterdir()) / 1024:.0f} KiB")


if __name__ == "__main__":
    cli.main(Options, copy, __doc__ or "")
