"""How a cell is written: SNASNet's four words, and a list of named edges.

Both readers return the cell as written, an ordered mapping from an edge `(source, target)` to the name of
its operation (`"skip"`, `"avgpool"`, `"conv3"`, ...). They know the grammar and nothing of any search
space: which edges and operations are allowed is for `space.CellSpace` to say.
"""

import re
from collections.abc import Mapping

NODES = 4
DIGITS = ("zero", "skip", "conv1", "conv3", "avgpool")
_WORDS = re.compile(r"\d+( \d+)*")
_EDGE = re.compile(r"([0-3])>([0-3]):([^\s:>]+)")

Edges = dict[tuple[int, int], str]


def read(text: str) -> Edges:
    """Reads a cell in either notation.

    Args:
      text: four words (`"0303 0030 2002 0200"`) or named edges (`"0>1:conv3 0>3:skip"`).

    Returns:
      The edges that are not zero, each with the name of its operation.

    Raises:
      ValueError: the text follows neither notation.
    """
    if not isinstance(text, str):
        raise ValueError(f"cell must be text such as '0003 0000 0000 0000', got {text!r}")
    tokens = text.split()
    if not tokens:
        raise ValueError(f"cell {text!r} is empty: write four words or edges such as '0>3:skip'")
    if _WORDS.fullmatch(" ".join(tokens)):
        return _read_words(text, tokens)
    return _read_edges(text, tokens)


def _read_words(text: str, words: list[str]) -> Edges:
    if len(words) != NODES or any(len(word) != NODES for word in words):
        raise ValueError(f"cell {text!r} must be four words of four digits, row = source, column = target")
    edges: Edges = {}
    for source, word in enumerate(words):
        for target, digit in enumerate(word):
            if int(digit) >= len(DIGITS):
                raise ValueError(f"cell {text!r} has digit {digit}: 0 is zero, 1 skip, 2 conv1x1, 3 conv3x3, 4 avgpool")
            if digit == "0":
                continue
            if source == target:
                raise ValueError(f"cell {text!r} joins node {source} to itself: the diagonal must be 0")
            edges[source, target] = DIGITS[int(digit)]
    return edges


def _read_edges(text: str, tokens: list[str]) -> Edges:
    edges: Edges = {}
    for token in tokens:
        match = _EDGE.fullmatch(token)
        if match is None:
            raise ValueError(
                f"cell {text!r} has {token!r}: write four words of four digits, or edges such as "
                "'0>3:skip', '0>1:avgpool', '1>3:conv3' between nodes 0 to 3"
            )
        edge = (int(match[1]), int(match[2]))
        if edge[0] == edge[1]:
            raise ValueError(f"cell {text!r} joins node {edge[0]} to itself: an edge needs two nodes")
        if edge in edges:
            raise ValueError(f"cell {text!r} gives the edge {edge[0]}>{edge[1]} twice: write it once")
        edges[edge] = match[3]
    return edges


def words(edges: Mapping[tuple[int, int], str]) -> str:
    """Writes a cell as SNASNet's four words.

    Args:
      edges: operation name of each edge; `"zero"` and missing edges are the same.

    Raises:
      ValueError: an operation has no digit (a convolution other than 1x1 and 3x3).
    """
    matrix = [["0"] * NODES for _ in range(NODES)]
    for (source, target), name in edges.items():
        if name not in DIGITS:
            raise ValueError(f"{name} on edge {source}>{target} has no digit: four words know only {DIGITS}")
        matrix[source][target] = str(DIGITS.index(name))
    return " ".join("".join(row) for row in matrix)


def edge_list(edges: Mapping[tuple[int, int], str]) -> str:
    """Writes a cell as named edges in the order given, zeros left out."""
    return " ".join(f"{source}>{target}:{name}" for (source, target), name in edges.items() if name != "zero")
