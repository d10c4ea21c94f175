"""Arguments of `group_norm_affine` for its tests. The statistics are those of `group_norm`, whose cases are harder."""

from typing import Any

import torch
from torch import Tensor

from fastgen.ops import group_norm_affine
from fastgen.reference import _moments

from .families import OfTensors
from .numerics import guarded, randn

NAMES = ("weight", "bias", "channel_bias", "scale", "shift")


def parameters(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    n, c = shape[:2]
    sizes = ((c,), (c,), (n, c), (n, c), (n, c))
    return {
        name: guarded(randn(*size, seed=i + 10, dtype=dtype))
        for i, (name, size) in enumerate(zip(NAMES, sizes, strict=True))
    }


def example(dtype: torch.dtype) -> dict[str, Any]:
    shape = (2, 6, 5, 7)
    return {"input": randn(*shape, dtype=dtype), "num_groups": 3, **parameters(shape, dtype)}


def examples() -> list[dict[str, Any]]:
    x = randn(2, 6, 5, 7, dtype=torch.float32)
    return [{**example(torch.float32), "input": guarded(x[:, :4].clone()), "skip": guarded(x[:, 4:].clone())}]


def known_arguments() -> tuple:
    """Arguments of `group_norm_affine_known`, all of them given."""
    given = examples()[0]
    parts = given["input"], given["skip"]
    return *parts, *map(_moments.moments, parts), 3, *(given[name] for name in NAMES), 1e-5


UNSEEN = {"group_norm_affine_known": known_arguments}
OWN_DTYPE = (0, 1)
REFUSED = [
    ("group_norm_affine", {"num_groups": 0}, "num_groups"),
    ("group_norm_affine", {"num_groups": 4}, "num_groups must divide channels"),
    ("group_norm_affine_known", {"num_groups": 4}, "num_groups must divide channels"),
    ("group_norm_affine_known", {"skip_moments": None}, "skip_moments must be given where skip is"),
    ("group_norm_affine_known", {"moments": torch.zeros(2, 4, 3)}, "moments must be what a convolution returns"),
]


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """An image may be of any size, where it is the only one."""
    return name == "input" and arguments["skip"] is None and how.startswith(("dimension 2", "dimension 3"))


MAPPED = OfTensors(
    lambda x, weight, shift: group_norm_affine(x, 2, weight, shift=shift),
    lambda k: [
        randn(*shape, seed=k + seed, dtype=torch.float32)
        for shape, seed in (((2, 4, 5, 7), 0), ((4,), 50), ((2, 4), 60))
    ],
)
EXPORTED = {
    "group_norm_affine": OfTensors(
        lambda x, shift: group_norm_affine(x, 2, shift=shift),
        lambda n: [randn(n, 4, 5, 7, dtype=torch.float32), randn(n, 4, dtype=torch.float32)],
    )
}
