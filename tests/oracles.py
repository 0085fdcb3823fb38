"""Convolution and pooling in NumPy float64, one output pixel at a time."""

import numpy as np


def conv_oracle(x, kernel, stride=1):
    """[..., H, W, C], padded with (k-1)/2 zeros on every side, one output pixel at a time."""
    k, pad = kernel.shape[0], kernel.shape[0] // 2
    h, w = x.shape[-3:-1]
    padded = np.zeros((*x.shape[:-3], h + 2 * pad, w + 2 * pad, x.shape[-1]))
    padded[..., pad : pad + h, pad : pad + w, :] = x
    out = np.zeros((*x.shape[:-3], (h - 1) // stride + 1, (w - 1) // stride + 1, kernel.shape[-1]))
    for i, j in np.ndindex(*out.shape[-3:-1]):
        window = padded[..., i * stride : i * stride + k, j * stride : j * stride + k, :]
        out[..., i, j, :] = np.tensordot(window, kernel, 3)
    return out


def avgpool_oracle(x):
    out = np.zeros_like(x)
    h, w = x.shape[-3:-1]
    for i, j in np.ndindex(h, w):
        window = x[..., max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2, :]
        out[..., i, j, :] = window.sum((-3, -2)) / 9
    return out


def downsample_oracle(x, p):
    h, w = x.shape[-3] // p, x.shape[-2] // p
    out = np.zeros((*x.shape[:-3], h, w, x.shape[-1]))
    for i, j in np.ndindex(h, w):
        out[..., i, j, :] = x[..., i * p : (i + 1) * p, j * p : (j + 1) * p, :].mean((-3, -2))
    return out
