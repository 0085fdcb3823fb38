"""The public names' docstrings show how each is used, and what they show is so."""

import doctest

import pytest

import spikernel_jax


@pytest.mark.parametrize("name", spikernel_jax.__all__)
def test_the_example_in_the_docstring(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = getattr(spikernel_jax, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(shown, name, globs={})
    assert test.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
