"""Prepares a data set for `load_dataset`, as TFDS array_record files, without TensorFlow.

    python tools/prepare_data.py cifar10 --data-dir DIR
    python tools/prepare_data.py mnist --data-dir DIR --archive FOLDER_WITH_THE_FOUR_GZ_FILES

The official archive is downloaded (CIFAR 170 MB, MNIST 12 MB, Fashion-MNIST 30 MB) unless `--archive` names a
copy: the .tar.gz file, or a folder that holds the unpacked files (for CIFAR) or the four .gz files (for both
MNISTs). Takes under a minute after the download.
"""

import dataclasses
import gzip
import tarfile
import tempfile
import types
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from spikernel_jax.data import DATASETS
from spikernel_jax.pipeline import cli

_TIMEOUT_S = 30.0
_MNIST_FILES = tuple(f"{part}-{what}-ubyte.gz" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))


@dataclasses.dataclass(frozen=True)
class _Official:
    """Where the official files are, and which of them are needed (names without folders)."""

    urls: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: tuple[tuple[str, str], ...] = ()  # (feature, file with its class names)


def _mnist(base: str) -> _Official:
    return _Official(tuple(base + file for file in _MNIST_FILES), _MNIST_FILES[:2], _MNIST_FILES[2:])


_OFFICIAL = {
    "cifar10": _Official(
        ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        ("test_batch.bin",),
        (("label", "batches.meta.txt"),),
    ),
    "cifar100": _Official(
        ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
        ("train.bin",),
        ("test.bin",),
        (("coarse_label", "coarse_label_names.txt"), ("label", "fine_label_names.txt")),
    ),
    "mnist": _mnist("https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion_mnist": _mnist("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
}


def prepare(name: str, data_dir: Path, archive: Path | None = None) -> Path:
    """Writes `data_dir`/name/version, readable by `load_dataset` and by `tfds.data_source`.

    Args:
      name: cifar10, cifar100, mnist or fashion_mnist.
      data_dir: TFDS folder, made if absent.
      archive: The official archive or a folder of its files; None downloads it.

    Returns:
      The folder written, or found to be prepared already.

    Raises:
      ValueError: An unknown name, a download that fails, an archive that is absent, incomplete or damaged.
    """
    if name not in _OFFICIAL:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(_OFFICIAL)}")
    info, official = DATASETS[name], _OFFICIAL[name]
    data_dir = data_dir.expanduser()
    target = data_dir / name / info.version
    if (target / "dataset_info.json").is_file():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        if archive is None:
            archive = _download(official.urls, Path(scratch))
        wanted = (*official.train, *official.test, *(file for _, file in official.names))
        files = _read_archive(archive.expanduser(), wanted)
        # Everything is parsed before TFDS starts, so a damaged archive leaves no half-written folder.
        parse = _parse_mnist if name in ("mnist", "fashion_mnist") else _parse_cifar
        splits = {
            split: parse([files[file] for file in members], members, name)
            for split, members in (("train", official.train), ("test", official.test))
        }
        names = {feature: files[file].decode().split() for feature, file in official.names}
        _build(name, data_dir, splits, names, Path(scratch))
    return target


def _download(urls: tuple[str, ...], folder: Path) -> Path:
    """Fetches the files into `folder`; returns the one file, or the folder if there are several."""
    for url in urls:
        target = folder / url.rsplit("/", 1)[-1]
        print(f"downloading {url}", flush=True)
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, target.open("wb") as out:
                while chunk := response.read(1 << 20):
                    out.write(chunk)
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(
                f"cannot download {url} ({reason}); fetch it elsewhere and pass it with --archive"
            ) from error
    return target if len(urls) == 1 else folder


def _read_archive(archive: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """Reads the wanted files, by name without folder, from a tar archive or a folder."""
    found: dict[str, bytes] = {}
    if archive.is_dir():
        for path in sorted(archive.rglob("*")):
            if path.name in wanted and path.is_file():
                found.setdefault(path.name, path.read_bytes())
    elif archive.is_file():
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    base = member.name.rsplit("/", 1)[-1]
                    stream = tar.extractfile(member) if base in wanted else None
                    if stream is not None:
                        found.setdefault(base, stream.read())
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{archive} is truncated or not a tar archive ({error})") from error
    else:
        raise ValueError(f"archive {archive} does not exist")
    if missing := [file for file in wanted if file not in found]:
        raise ValueError(f"{archive} lacks {', '.join(missing)}")
    return found


def _parse_cifar(parts: list[bytes], members: tuple[str, ...], name: str) -> dict[str, np.ndarray]:
    """Parses CIFAR's binary format: per image its label bytes (100: coarse, fine), then 3072 pixels, CHW."""
    keys = ("label",) if name == "cifar10" else ("coarse_label", "label")
    size = len(keys) + 3072
    for member, part in zip(members, parts, strict=True):
        if not part or len(part) % size:
            raise ValueError(f"{member} holds {len(part)} bytes, not a whole number of {size}-byte images")
    table = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, size)
    columns = {key: table[:, i] for i, key in enumerate(keys)}
    return columns | {"image": table[:, len(keys) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)}


def _parse_mnist(parts: list[bytes], members: tuple[str, ...], name: str) -> dict[str, np.ndarray]:
    """Parses gzipped idx files: magic and sizes as big-endian int32, then bytes."""
    arrays = []
    for member, part, axes in zip(members, parts, (3, 1), strict=True):
        try:
            data = gzip.decompress(part)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{name}: {member} is truncated or not gzip ({error})") from error
        head = np.frombuffer(data[: 4 * (axes + 1)], ">i4") if len(data) >= 4 * (axes + 1) else np.zeros(1, ">i4")
        if head[0] != 0x0800 + axes or len(data) != 4 * (axes + 1) + int(np.prod(head[1:], dtype=np.int64)):
            raise ValueError(f"{name}: {member} is not an idx file of {axes} axes, or is cut short")
        arrays.append(np.frombuffer(data, np.uint8, offset=4 * (axes + 1)).reshape(head[1:]))
    images, labels = arrays
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or not len(labels):
        raise ValueError(f"{name}: {members[0]} has shape {images.shape}, {members[1]} {labels.shape}")
    return {"label": labels, "image": images[..., None]}


def _build(
    name: str,
    data_dir: Path,
    splits: dict[str, dict[str, np.ndarray]],
    names: dict[str, list[str]],
    scratch: Path,
) -> None:
    """Runs TFDS's own builder for `name`, with only the part that needs TensorFlow replaced."""
    import cv2
    import tensorflow_datasets as tfds

    for split, columns in splits.items():
        if columns["label"].max() >= DATASETS[name].num_classes:
            raise ValueError(f"{name}: {split} labels reach {columns['label'].max()}, beyond the known classes")

    def examples(split: str, columns: dict[str, np.ndarray]) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(len(columns["label"])):
            record: dict[str, Any] = {key: int(column[i]) for key, column in columns.items() if key != "image"}
            # Encoded here (cv2 wants BGR): TFDS needs TensorFlow to encode arrays, but takes bytes as is.
            pixels = np.ascontiguousarray(columns["image"][i][..., ::-1])
            record["image"] = cv2.imencode(".png", pixels)[1].tobytes()
            if name.startswith("cifar"):
                record["id"] = f"{split}_{i:05d}"
            yield i, record

    def split_generators(builder: Any, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        for feature, values in names.items():
            builder.info.features[feature].names = values
        return {split: examples(split, columns) for split, columns in splits.items()}

    # A subclass, so that name, version, features and keys (hence the stored order) are TFDS's own.
    body = {"name": name, "_split_generators": split_generators, "__module__": __name__}
    base = tfds.builder_cls(name)
    cls = types.new_class(base.__name__, (base,), {"skip_registration": True}, lambda ns: ns.update(body))
    builder = cls(data_dir=data_dir, file_format="array_record")
    if str(builder.version) != DATASETS[name].version:
        raise ValueError(f"the installed TFDS has {name} {builder.version}, expected {DATASETS[name].version}")
    builder.download_and_prepare(download_dir=scratch / "downloads")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which data set to prepare, and where."""

    name: Annotated[Literal["cifar10", "cifar100", "mnist", "fashion_mnist"], tyro.conf.Positional]
    """Data set."""
    data_dir: Path
    """Folder to write to; pass the same to load_dataset, or set TFDS_DATA_DIR."""
    archive: Path | None = None
    """Official archive, or folder with its files. Downloaded if not given."""


def run(options: Options) -> None:
    """Prepares the data set and says where it is."""
    cli.say(f"ready: {prepare(options.name, options.data_dir, options.archive)}")


if __name__ == "__main__":
    cli.main(Options, run, __doc__ or "")
