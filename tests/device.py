"""A device in NumPy: programs of integers run image by image, in 64 bits, place by place."""

import math

import numpy as np

from spikernel_jax.embedded import program as ops


def scaled(x, scale):
    y = np.empty_like(x)
    for c in range(x.shape[-1]):
        m, s = (int(own[c % len(own)]) for own in scale)
        y[..., c] = [[math.floor(int(v) * m / 2**s + 0.5) if s else int(v) * m for v in row] for row in x[..., c]]
    return y


def tap(x, i, j):
    """x moved so that each place holds its neighbour's value, zero beyond the border."""
    y = np.zeros_like(x)
    h, w = x.shape[:2]
    for row in range(max(0, -i), min(h, h - i)):
        for column in range(max(0, -j), min(w, w - j)):
            y[row, column] = x[row + i, column + j]
    return y


def around(k, apart=1):
    return [apart * (i - k // 2) for i in range(k)]


def convolved(own, x):
    kh, kw, _, channels = own.weights.shape
    y = np.zeros((*x.shape[:2], channels), np.int64)
    for a, i in enumerate(around(kh, own.dilation)):
        for b, j in enumerate(around(kw, own.dilation)):
            moved = tap(x, i, j)
            y += moved * own.weights[a, b, 0] if own.groups > 1 else moved @ own.weights[a, b]
    y = y[:: own.stride, :: own.stride]
    return scaled(y, own.scale) + own.bias


def blocks(x, high, wide):
    h, w = x.shape[0] // high, x.shape[1] // wide
    return np.array([[x[r * high : (r + 1) * high, c * wide : (c + 1) * wide].sum((0, 1)) for c in range(w)]
                     for r in range(h)])  # fmt: skip


def made(own, x, shape):
    match own:
        case ops.Convolve():
            return convolved(own, x)
        case ops.Affine():
            return scaled(x, own.scale) + own.bias
        case ops.Shift():
            return x * 2**own.left
        case ops.AveragePool():
            window = around(own.window)
            scale = [np.repeat(part, x.shape[-1]) for part in own.scale]
            return scaled(sum(tap(x, i, j) for i in window for j in window), scale)
        case ops.MaxPool():
            window = around(own.window)
            return np.maximum.reduce([tap(x, i, j) for i in window for j in window]) * 2**own.left
        case ops.Halve():
            return np.floor(blocks(x, 2, 2) / 4 + 0.5).astype(np.int64)
        case ops.Count():
            return blocks(x, *own.side)
        case ops.Linear():
            return (scaled((x.reshape(-1) @ own.weights)[None, None], own.scale) + own.bias).reshape(shape)
        case ops.Clear():
            return np.zeros(shape, np.int64)
    raise AssertionError(own)


def run(program, image):
    """Logits, spike counts [T] by site, least and greatest values of each buffer's channels, spikes by place [H, W]."""
    channels = range(image.shape[-1])
    now = {name: np.zeros(buffer.shape, np.int64) for name, buffer in program.buffers.items()}
    now["image"] = np.stack([program.table[image[..., c], c] for c in channels], -1)
    seen, counts, places = {}, {site: [] for site in program.sites}, {}

    def write(name, values):
        buffer = program.buffers[name]
        if buffer.clips:
            most = 2 ** (buffer.bits - 1)
            values = np.minimum(np.maximum(values, -most), most - 1)
        now[name] = values
        see(name)

    def see(name):
        flat = now[name].reshape(-1, now[name].shape[-1])
        low, high = flat.min(0), flat.max(0)
        if name in seen:
            low, high = np.minimum(low, seen[name][0]), np.maximum(high, seen[name][1])
        seen[name] = low, high

    def go(instructions):
        for own in instructions:
            if isinstance(own, ops.Fire):
                x, v = now[own.source], now[own.state]
                v = v + np.floor((x - (v - own.reset)) * own.leak / 2**own.leak_shift + 0.5).astype(np.int64)
                fired = np.zeros_like(v)
                for _ in range(program.buffers[own.target].most):
                    above = v >= own.threshold
                    v = np.where(above, v - own.threshold if own.soft else own.reset, v)
                    fired += above
                write(own.state, v)
                write(own.target, fired)
                counts[own.target].append(int(fired.sum()))
                places[own.target] = places.get(own.target, 0) + fired.sum(-1)
            else:
                y = made(own, now[own.source], program.buffers[own.target].shape)
                write(own.target, now[own.target] + y if own.add else y)

    see("image")
    go(program.once)
    for _ in range(program.time_steps):
        go(program.step)
    go(program.end)
    return now["logits"][0, 0], counts, seen, places
