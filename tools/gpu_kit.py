"""Packs prepared data and wheels for a GPU machine without a network, and prints the one command to run there.

    python tools/gpu_kit.py cifar10 --data-dir DIR --out kit

Carry the folder and this repository there. The wheels are those that `PACKAGES` names, in the versions that are
installed here, for CPython 3.12 on x86-64 Linux: what a machine with JAX, flax, optax, orbax, matplotlib, psutil,
rich and opencv-python-headless lacks; --also names more. Wheels need a network here. Data and wheels of cifar100
are together above the 64 MiB that such a way in may allow: give --part wheels and --part data, and carry one by one.
"""

import dataclasses
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import tyro

from spikernel_jax.data import DATASETS
from spikernel_jax.io.files import atomic_folder, one_line
from spikernel_jax.pipeline import cli

LIMIT = 64 * 2**20
PACKAGES = (
    "spyx", "grain", "portpicker", "jax-tqdm", "nir",
    "tensorflow-datasets", "array-record", "dm-tree", "immutabledict", "promise", "simple-parsing", "toml",
    "tensorflow-metadata", "googleapis-common-protos", "termcolor",
    "tyro", "docstring-parser", "typeguard",
)  # fmt: skip
_SOURCE_ONLY = {"promise"}  # the index has no wheel of it; pure Python, so one built here serves anywhere
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_DATA, _WHEELS = "tfds", "wheels"


def data_folder(name: str, data_dir: Path) -> Path:
    """Where a data set lies prepared, as NAME/VERSION in `data_dir`; ValueError if it is not there, or not TFDS's."""
    if name not in DATASETS or DATASETS[name].kind != "tfds":
        known = ", ".join(info.name for info in DATASETS.values() if info.kind == "tfds")
        raise ValueError(f"{name!r} is no data set that is prepared for TFDS; those are {known}")
    folder = data_dir.expanduser() / name / DATASETS[name].version
    if not (folder / "dataset_info.json").is_file():
        raise ValueError(f"{folder} holds no prepared data; {DATASETS[name].how_to_get.format(data_dir=data_dir)}")
    return folder


def wheel_commands(packages: tuple[str, ...], folder: Path) -> list[list[str]]:
    """The pip commands that put the packages' wheels into a folder, in the versions installed here.

    Raises:
      ValueError: a package is not installed here.
    """
    pinned = {}
    for package in packages:
        try:
            pinned[package] = f"{package}=={metadata.version(package)}"
        except metadata.PackageNotFoundError:
            raise ValueError(f"package {package!r} is not installed here, so its version is not known") from None
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    target = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    target += [part for platform in _PLATFORMS for part in ("--platform", platform)]
    binary = [pin for package, pin in pinned.items() if package not in _SOURCE_ONLY]
    source = [pin for package, pin in pinned.items() if package in _SOURCE_ONLY]
    commands = [[*pip, "download", "--no-deps", *target, "-d", str(folder), *binary]] if binary else []
    return commands + ([[*pip, "wheel", "--no-deps", "-w", str(folder), *source]] if source else [])


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_size(size: int, limit: int) -> None:
    """Refuses more bytes than a kit may have."""
    if size > limit:
        raise ValueError(
            f"the kit has {size / 2**20:.1f} MiB, more than --limit-mib {limit / 2**20:g}: "
            "give --part wheels and --part data, and carry one after the other"
        )


def command(name: str, kit: Path) -> str:
    """What to run on the GPU machine, in the repository's root, with the kit beside it."""
    at = shlex.quote(kit.name)
    return (
        f"python3 -m pip install -q --no-index --no-deps --target site {at}/{_WHEELS}/*.whl && "
        f"PYTHONPATH=$PWD:$PWD/site python3 experiments/accuracy.py --data {name} --preset h100-10min "
        f"--data-dir {at}/{_DATA} --out accuracy-{name}"
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """What to pack."""

    name: Annotated[Literal["cifar10", "cifar100"], tyro.conf.Positional]
    """Data set."""
    data_dir: Path
    """Where it lies prepared."""
    out: Path = Path("kit")
    """Folder to make."""
    part: Literal["all", "data", "wheels"] = "all"
    """What of it."""
    also: tuple[str, ...] = ()
    """Packages besides `PACKAGES`."""
    limit_mib: float = LIMIT / 2**20
    """Largest size of the kit."""


def pack(options: Options) -> int:
    """Makes the kit, whole or not at all.

    Returns:
      Its size in bytes.

    Raises:
      ValueError: one line, if the data are not there, a wheel cannot be had, the kit is too large, or there is
        something at `out`.
    """
    limit = int(options.limit_mib * 2**20)
    if options.out.exists():
        raise ValueError(f"{options.out} is there already: choose another --out or remove it")
    source = data_folder(options.name, options.data_dir) if options.part != "wheels" else None
    check_size(folder_size(source) if source else 0, limit)
    options.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(options.out.absolute()) as fresh:
        fresh.mkdir()
        if source:
            shutil.copytree(source, fresh / _DATA / options.name / source.name)
        if options.part != "data":
            for arguments in wheel_commands((*PACKAGES, *options.also), fresh / _WHEELS):
                result = subprocess.run(arguments, capture_output=True, text=True)
                if result.returncode:
                    error = next((line for line in result.stderr.splitlines() if "ERROR" in line), result.stderr)
                    raise ValueError(f"pip: {one_line(ValueError(error))}")
        check_size(size := folder_size(fresh), limit)
    return size


def run(options: Options) -> None:
    """Packs, and prints the command."""
    size = pack(options)
    cli.say(f"{options.out}: {size / 2**20:.1f} MiB. On the GPU machine, in the repository's root:")
    print(command(options.name, options.out))


if __name__ == "__main__":
    cli.main(Options, run, __doc__ or "")
