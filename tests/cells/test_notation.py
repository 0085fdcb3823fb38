"""Cells as text: what is written is read, and what is no cell is refused."""

import numpy as np
import pytest
from hypothesis import given

from convolutions import conv_edges
from small_spaces import LOOPED, ONE_SET, UNION, WIDE_LOOPED, properties, spaces_and_rows
from spikernel_jax.cells.space import CellSpace


@properties
@given(spaces_and_rows())
def test_parse_reads_what_format_writes(case):
    space, row = case
    assert np.array_equal(space.parse(space.format(row)), row)
    assert np.array_equal(space.parse(space.explicit(row)), row)
    assert space.parse(space.format(row)).dtype == np.int8


@pytest.mark.parametrize(
    ("text", "edges"),
    [
        (
            "0303 0030 2002 0200",
            "0>1:conv3 1>2:conv3 0>3:conv3 2>3:conv1 2>0:conv1 3>1:conv1",
        ),
        ("0003 0000 0000 0000", "0>3:conv3"),
        ("0142 0030 0004 0000", "0>1:skip 0>2:avgpool 1>2:conv3 0>3:conv1 2>3:avgpool"),
    ],
)
def test_golden_notation(text, edges):
    row = LOOPED.parse(text)
    assert LOOPED.explicit(row) == edges
    assert LOOPED.format(row) == text
    assert np.array_equal(LOOPED.parse(edges), row)
    assert WIDE_LOOPED.explicit(WIDE_LOOPED.parse(text)) == WIDE_LOOPED.format(WIDE_LOOPED.parse(text)) == edges


def test_golden_row():
    assert LOOPED.parse("0303 0030 2002 0200").tolist() == [3, 0, 3, 3, 0, 2, 0, 2, 0, 0, 2, 0]
    assert UNION.parse("0>3:conv7 0>1:avgpool").tolist() == [6, 0, 0, 5, 0, 0]
    assert conv_edges(UNION, UNION.parse("0>3:conv7 0>1:conv5")) == [(0, 1, 5), (0, 3, 7)]


@pytest.mark.parametrize(
    ("space", "text", "match"),
    [
        (ONE_SET, "", "is empty"),
        (ONE_SET, None, "must be text"),
        (ONE_SET, "0303 0030 2002 0200", "feedback edge 2>0"),
        (ONE_SET, "0003 0000 0000", "four words of four digits"),
        (ONE_SET, "0003 0000 0000 000", "four words of four digits"),
        (ONE_SET, "0005 0000 0000 0000", "digit 5"),
        (ONE_SET, "1003 0000 0000 0000", "node 0 to itself: the diagonal"),
        (ONE_SET, "0300 0003 0000 0000", "edge 0>3 must not be zero"),
        (ONE_SET, "0>1:skip 1>3:skip", "edge 0>3 must not be zero"),
        (ONE_SET, "0>3:skip 0>3:conv1", "0>3 twice"),
        (ONE_SET, "0>3:skip 1>1:conv1", "node 1 to itself"),
        (ONE_SET, "0>3:maxpool", "operation 'maxpool' is unknown: did you mean 'maxpool3'"),
        (ONE_SET, "0>4:skip", "'0>4:skip'"),
        (ONE_SET, "0>3:conv5", "has conv5 on edge 0>3"),
        (CellSpace((5, 7)), "0003 0000 0000 0000", "has conv3 on edge 0>3"),
        (CellSpace((3,)), "0002 0000 0000 0000", "has conv1 on edge 0>3"),
        (LOOPED, "0303 3000 0000 0000", "not both directions"),
        (UNION, "0>3:conv1 0>1:conv3 1>3:conv5", "at most 2 different sizes"),
    ],
)
def test_parse_refuses(space, text, match):
    with pytest.raises(ValueError, match=match):
        space.parse(text)
