"""Amounts as people write them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikernel_jax.io.units import duration, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512KiB", 524288),
        ("1.5MiB", 1572864),
        ("2MB", 2_000_000),
        ("100000", 100000),
        ("64 kB", 64000),
        (" 1gib ", 2**30),
        ("0.1 kB", 100),
        ("1.0009kb", 1000),
        (".5KiB", 512),
        ("7b", 7),
        ("1.1TB", 1_100_000_000_000),
        (4096, 4096),
        (np.int64(3), 3),
    ],
)
def test_parse_bytes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "0", "0.4B", "-5", "-1KiB", "nan", "inf", "1e6", "KiB", "5 K", "5 bits", "1,5MiB", "1.2.3", "٣",
     "9" * 50, "2MB 3", 0, -1, True, 1.5, float("inf"), None],
)  # fmt: skip
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="is not an amount of memory: write") as error:
        parse_bytes(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (524288, "512.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**20 - 100, "1023.9 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (5 * 2**40, "5.0 TiB"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


@given(st.integers(1, 2**50))
def test_format_bytes_reads_back_within_its_digits(count):
    assert abs(parse_bytes(format_bytes(count)) - count) <= max(0.05 * count, 0)


def test_format_bytes_refuses():
    with pytest.raises(ValueError, match="0 or more"):
        format_bytes(-1)


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 89.4, 90, 3600)] == ["0 s", "89 s", "2 min", "60 min"]
    assert duration(100, 1) == "1.7 min"
