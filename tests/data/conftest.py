"""Folders of data that the tests of a process share."""

from pathlib import Path

import pytest

import prepare_data
from official_files import SHARED, mnist_archive, tiny_folder
from spikernel_jax.data import DATASETS


@pytest.fixture(scope="session")
def roots(tmp_path_factory):
    """Returns a function from a name to the folder with its data, made at the first call."""
    made = {}

    def root(name):
        if DATASETS[name].kind == "embedded":
            return None
        if name == "cifar10":
            return Path(__file__).parent  # real images, a few (tools/make_test_data.py)
        if name == "cifar100":
            if not (SHARED / "tfds" / name).is_dir():
                pytest.skip("needs prepared CIFAR-100 beside the repository")
            return SHARED / "tfds"
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name == "tiny_imagenet":
                tiny_folder(folder)
            else:
                prepare_data.prepare(name, folder, mnist_archive(folder / "archive"))
            made[name] = folder
        return made[name]

    return root
