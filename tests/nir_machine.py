"""An interpreter of NIR graphs, step by step, that knows nothing of the package."""

from graphlib import TopologicalSorter
from typing import Any

import nir
import numpy as np


def convolved(node: Any, x: np.ndarray) -> np.ndarray:
    """[C_in, H, W] to [C_out, H', W'], tap by tap."""
    weight, (ph, pw), (sh, sw), (dh, dw) = node.weight, node.padding, node.stride, node.dilation
    out, per_group, kh, kw = weight.shape
    padded = np.pad(x, ((0, 0), (ph, ph), (pw, pw)))
    high = (padded.shape[1] - dh * (kh - 1) - 1) // sh + 1
    wide = (padded.shape[2] - dw * (kw - 1) - 1) // sw + 1
    y = np.zeros((out, high, wide)) + np.asarray(node.bias, np.float64)[:, None, None]
    for o in range(out):
        first = o // (out // node.groups) * per_group
        for k in range(per_group):
            for i in range(kh):
                for j in range(kw):
                    seen = padded[first + k, i * dh : i * dh + sh * high : sh, j * dw : j * dw + sw * wide : sw]
                    y[o] += float(weight[o, k, i, j]) * seen
    return y


def pooled(node: Any, x: np.ndarray) -> np.ndarray:
    (kh, kw), (sh, sw), (ph, pw) = node.kernel_size, node.stride, node.padding
    padded = np.pad(x, ((0, 0), (ph, ph), (pw, pw)))
    high, wide = (padded.shape[1] - kh) // sh + 1, (padded.shape[2] - kw) // sw + 1
    taps = [padded[:, i : i + sh * high : sh, j : j + sw * wide : sw] for i in range(kh) for j in range(kw)]
    return sum(taps) / (kh * kw)


def run(graph: nir.NIRGraph, image: np.ndarray, steps: int) -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
    """Mean output over time, and the spikes of every LIF at every step."""
    before: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        before[target].append(source)
    order = list(TopologicalSorter(before).static_order())
    membranes: dict[str, np.ndarray] = {}
    spikes: dict[str, list[np.ndarray]] = {}
    outputs = []
    for _ in range(steps):
        values: dict[str, np.ndarray] = {}
        for name in order:
            node = graph.nodes[name]
            x = image if isinstance(node, nir.Input) else np.sum([values[source] for source in before[name]], 0)
            match node:
                case nir.Conv2d():
                    x = convolved(node, x)
                case nir.AvgPool2d():
                    x = pooled(node, x)
                case nir.Scale():
                    x = node.scale * np.asarray(x)
                case nir.Flatten():
                    x = np.ravel(x)
                case nir.Linear():
                    x = np.asarray(node.weight, np.float64) @ x
                case nir.Affine():
                    x = np.asarray(node.weight, np.float64) @ x + node.bias
                case nir.LIF():
                    v = membranes.get(name, np.zeros(node.tau.shape))
                    v = v + (node.v_leak - v + node.r * x) / node.tau
                    x = (v >= node.v_threshold).astype(float)
                    membranes[name] = np.where(x > 0, np.asarray(node.v_reset), v)
                    spikes.setdefault(name, []).append(x)
                case nir.Input() | nir.Output():
                    pass
                case _:
                    raise TypeError(type(node).__name__)
            values[name] = np.asarray(x)
        outputs.append(values["output"])
    return np.mean(outputs, 0), spikes
