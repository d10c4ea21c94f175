"""Winograd's error beside that of TF32, in which GPUs multiply float32 unless told otherwise."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import requires_cpu
from .numerics import randn


def in_tf32(t: Tensor) -> Tensor:
    """float32 rounded to eleven significant bits, ties to even."""
    bits = t.view(torch.int32)
    last = (bits >> 13) & 1
    return ((bits + 0xFFF + last) & -0x2000).view(torch.float32)


def test_what_tf32_keeps():
    kept = torch.tensor([1.0, 1 + 2**-10, -3.0, 1 + 2**-11, 1 + 3 * 2**-11])
    assert in_tf32(kept).tolist() == [1.0, 1 + 2**-10, -3.0, 1.0, 1 + 2**-9]


@pytest.mark.isa
@requires_cpu
@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize("shape", [(2, 128, 16, 16), (1, 320, 17, 9)])
def test_at_most_a_twentieth_of_its_error(shape, outputs):
    x, weight = randn(*shape, dtype=torch.float32), 0.05 * randn(64, shape[1], 3, 3, seed=1, dtype=torch.float32)
    packed = torch.ops.fastgen.conv2d_pack(weight, outputs)
    actual = torch.ops.fastgen.conv2d_packed(x, packed, len(weight), None, None, None, 0, None, None, 1.0, None)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    tf32 = F.conv2d(in_tf32(x).double(), in_tf32(weight).double(), padding=1)
    assert (actual - exact).norm() <= (tf32 - exact).norm() / 20
