"""What the modules of imagen-pytorch, DALLE2-pytorch and make-a-video-pytorch have in common, in our words."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

EPS = {torch.float32: 1e-5}  # of layer norms, in other dtypes 1e-3


def exists(value):
    return value is not None


def layer_norm(x, dim, eps):
    return (x - x.mean(dim, keepdim=True)) * (x.var(dim, unbiased=False, keepdim=True) + eps).rsqrt()


def spread(t, x):
    """[N, C] over the positions of x."""
    return t.reshape(*t.shape, *[1] * (x.dim() - 2))


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def heads(t, n):
    return t.unflatten(2, (n, -1)).transpose(1, 2)


def attended(q, k, v, scale, bias=None, causal=False, mask=None, dropout=None):
    scores = q @ k.transpose(2, 3) * scale
    if exists(bias):
        scores = scores + bias
    if exists(mask):
        scores = scores.masked_fill(~F.pad(mask, (1, 0), value=True)[:, None, None, :], -torch.finfo(scores.dtype).max)
    if causal:
        i, j = scores.shape[2:]
        scores = scores.masked_fill(torch.ones(i, j).triu(j - i + 1).bool(), -torch.finfo(scores.dtype).max)
    weights = scores.softmax(-1)
    return ((dropout(weights) if exists(dropout) else weights) @ v).transpose(1, 2).flatten(2)


def with_null(null_kv, k, v):
    return (torch.cat([null.expand(*t.shape[:2], 1, -1), t], 2) for null, t in zip(null_kv, (k, v), strict=True))


def of_frames(conv, x):
    if x.dim() == 4:
        return conv(x)
    return conv(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


def of_pixels(conv, x):
    n, _, _, h, w = x.shape
    return conv(x.permute(0, 3, 4, 1, 2).flatten(0, 2)).unflatten(0, (n, h, w)).permute(0, 3, 4, 1, 2)


def project(**classes):
    """Classes under the names that they have in a project."""
    for name, kind in classes.items():
        kind.__name__ = name
    return SimpleNamespace(**classes)
