"""What the captured loop refuses without a GPU; what it does with one is in tests/gpu."""

import pytest

from fastgen.samplers import CapturedSampler


def test_needs_cuda():
    with pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        CapturedSampler(lambda x, t: x, (2, 1, 4, 4), "ddim", steps=3)


@pytest.mark.parametrize("name", ["generator", "callback", "noise", "seeds", "mask"])
def test_refuses_what_a_graph_cannot_hold(name):
    with pytest.raises(ValueError, match=f"takes no .*{name}"):
        CapturedSampler(lambda x, t: x, (2, 1, 4, 4), "ddim", steps=3, **{name: None})
