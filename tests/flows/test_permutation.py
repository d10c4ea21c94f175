"""Permutations keep dtype, device and values, whatever happens to their module."""

import pytest
import torch

from fastgen.flows import AffineCoupling, Compose, Permutation, ResidualMLP, Reverse, Shift
from fastgen.flows.indices import Indices


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("make", [lambda: Permutation([2, 0, 1]), Reverse, lambda: Shift(1)])
def test_values_and_dtype(make, dtype):
    layer = make().to(torch.float64)
    x = torch.arange(12).view(2, 3, 2).to(dtype)
    y, log_det = layer(x)
    assert y.dtype == dtype and torch.equal(layer.inverse(y)[0], x) and sorted(y[0, :, 0].tolist()) == [0, 2, 4]
    assert log_det.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not log_det.any()


def test_which_channel_goes_where():
    x = torch.tensor([[10.0, 11.0, 12.0, 13.0]])
    assert Permutation([3, 0, 2, 1])(x)[0].tolist() == [[13, 10, 12, 11]]
    assert Reverse()(x)[0].tolist() == [[13, 12, 11, 10]]
    assert Shift(1)(x)[0].tolist() == [[13, 10, 11, 12]]
    assert torch.equal(Permutation.random(9, 4).order.values, Permutation.random(9, 4).order.values)


def test_indices_follow_their_module_through_the_meta_device():
    with torch.device("meta"):
        indices = Indices([4, 2])
    assert indices.values.is_meta
    for move in (lambda m: m.to_empty(device="cpu"), lambda m: m.to("cpu"), lambda m: m.to("meta").double().to("cpu")):
        moved = move(indices)
        assert moved.values.tolist() == [4, 2] and moved.values.dtype == torch.int64
        indices.to("meta")
    assert Indices([1]).double().half().values.dtype == torch.int64
    assert not Indices([1]).state_dict()
    assert repr(Indices(range(9))) == "Indices(0, 1, 2, 3, ..., 9 in all)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Permutation([0, 2]), r"Permutation: permutation must have each of 0 to 1 once, got \[0, 2\]"),
        (lambda: Permutation([0, 1])(torch.zeros(2, 3)), r"Permutation: input must be \[N, 2, \*\], got shape \(2, 3\)"),
        (lambda: Reverse()(torch.zeros(2)), r"Reverse: input must be \[N, C, \*\], got shape \(2,\)"),
        (lambda: AffineCoupling(ResidualMLP(1, 2), mask="left"), "AffineCoupling: mask must be one of"),
        (lambda: AffineCoupling(ResidualMLP(1, 2), mask=[0]), "AffineCoupling: a list as mask needs channels"),
        (
            lambda: AffineCoupling(ResidualMLP(1, 2), mask=[0, 0], channels=3),
            r"AffineCoupling: mask must name some, not all, of 0 to 2, each once, got \[0, 0\]",
        ),
        (lambda: AffineCoupling(ResidualMLP(1, 2), scale_fn="cube"), "AffineCoupling: scale_fn must be a ScaleFn or one of"),
        (lambda: AffineCoupling(ResidualMLP(1, 2))(torch.zeros(2, 1)), r"AffineCoupling: input must be \[N, C, \*\] with C >= 2"),
        (
            lambda: AffineCoupling(ResidualMLP(1, 2), mask="checkerboard")(torch.zeros(2, 2)),
            r"AffineCoupling: input must be \[N, C, H, W\] for 'checkerboard', got \(2, 2\)",
        ),
        (lambda: Compose([Reverse(), torch.nn.ReLU()]), r"Compose: transforms\[1\] must be a fastgen.flows.Transform, got ReLU"),
    ],
)  # fmt: skip
def test_errors_name_the_layer(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
