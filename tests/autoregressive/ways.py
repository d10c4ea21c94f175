"""`sample` by each of its methods, and the small models that it is tried on."""

import torch

from fastgen.autoregressive import sample

from ..models.small_autoregressive import SMALL, build
from ..modules import max_difference

METHODS = ("cached", "jacobi", "naive")
LABELS = torch.tensor([2, 0, 1])
# Of sums in another order, through some dozens of layers, of logits of order 1.
BOUND = {torch.float64: 1e-11, torch.float32: 2e-5}


def shape_of(name, n=3):
    return (n, *SMALL[name][2])


def with_condition(name, kind, dtype=torch.float64):
    """A model that is conditioned, and its condition for three images."""
    options = {"labels": {"num_classes": 3}, "map": {"condition_channels": 2}}
    options["both"] = options["labels"] | options["map"]
    area = torch.randn(3, 2, *SMALL[name][2][1:], generator=torch.Generator().manual_seed(1), dtype=dtype)
    return build(name, dtype, **options[kind]), {"labels": LABELS, "map": area, "both": (LABELS, area)}[kind]


def three_ways(model, shape, methods=METHODS, **options):
    """What `sample` draws, the same by every method.

    A mixture that is not rounded draws any number, which another order of sums rounds otherwise.
    """
    found = {method: sample(model, shape, method=method, **options) for method in methods}
    off = 1e-9 if options.get("distribution") == "logistic_mixture" and "levels" not in options else 0.0
    for method in methods[1:]:
        assert max_difference(found[method], found["cached"]) <= off, method
    assert found["cached"].shape == shape and found["cached"].isfinite().all()
    return found["cached"]
