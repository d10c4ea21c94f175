"""The loops over full networks: Jacobi decoding draws what the loop over pixels draws, in fewer passes, sample by sample."""

import pytest
import torch
from torch import nn

from fastgen.autoregressive.full_network import FullNetwork
from fastgen.autoregressive.jacobi import jacobi
from fastgen.autoregressive.naive import naive

from . import models
from .models import prepared
from .test_causality import ByColor


def uniform(seeds, numbers):
    """One of every (seed, number), [n, *numbers.shape]."""
    x = (seeds.reshape(-1, *[1] * numbers.dim()) * 7919 + numbers * 104729 + 1).double()
    return (x.sin() * 43758.5453) % 1


def categorical(levels, colors):
    """A draw of levels first, by the inverse of the cumulative distribution."""

    def draw(logits, seeds, place, colors_of_pixel=(0, colors), **keywords):
        first, last = keywords.get("colors", colors_of_pixel)
        pixels = place + torch.arange(logits.shape[2] * logits.shape[3]).reshape(logits.shape[2:])
        u = uniform(seeds, pixels[None] * colors + torch.arange(first, last)[:, None, None])
        steps = logits.unflatten(1, (levels, colors))[:, :, first:last].softmax(1).cumsum(1)
        return (u[:, None] >= steps).sum(1).clamp(max=levels - 1)

    return draw


def parts(model, shape, levels, known_rows=0):
    image = torch.zeros(shape, dtype=torch.float64)
    known = torch.zeros(1, 1, *shape[2:], dtype=torch.bool)
    known[:, :, :known_rows] = True
    image[:, :, :known_rows] = 1
    return FullNetwork(prepared(model), shape), categorical(levels, shape[1]), torch.arange(shape[0]) + 5, image, known


@pytest.mark.parametrize("known_rows", [0, 2])
@pytest.mark.parametrize("colors", [1, 3])
def test_jacobi_draws_what_the_loop_over_pixels_does(colors, known_rows):
    arguments = parts(models.Gated(colors=colors), (3, colors, 5, 6), 4, known_rows)
    expected = naive(*arguments)
    result, passes = jacobi(*arguments)
    assert result.equal(expected) and expected.unique().numel() > 2
    assert bool((expected[:, :, :known_rows] == 1).all())
    assert int(passes.min()) > 1 and int(passes.max()) <= (5 - known_rows) * 6


def test_an_image_depends_on_its_seed_alone():
    network, draw, seeds, image, known = parts(models.Gated(), (4, 1, 5, 5), 4)
    together, passes = jacobi(network, draw, seeds, image, known)
    assert len(passes.unique()) > 1  # each stops where it is done
    for i in range(4):
        alone, own = jacobi(network, draw, seeds[i : i + 1], image[i : i + 1], known)
        assert alone.equal(together[i : i + 1]) and own.equal(passes[i : i + 1])


def test_colors_in_turn():
    arguments = parts(ByColor((0, 1, 2), levels=4), (2, 3, 3, 4), 4)
    expected = naive(*arguments, colors=(0, 1, 2))
    result, passes = jacobi(*arguments, in_turn=True)
    assert result.equal(expected) and int(passes.max()) <= 3 * 12
    assert not expected.equal(naive(*arguments))


def test_the_longest_chain_takes_a_pass_a_pixel():
    """Every pixel is one more than the pixel before it."""

    def network(image, samples):
        return torch.cat([torch.zeros(len(image), 1), image.flatten(1)[:, :-1]], 1).view_as(image)

    def draw(logits, seeds, place, colors=None):
        return logits + 1

    seen = []
    seeds, image, known = torch.arange(2), torch.zeros(2, 1, 3, 4), torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    result, passes = jacobi(network, draw, seeds, image, known, progress=seen.append)
    assert result.flatten(1).equal(torch.arange(1.0, 13).expand(2, 12)) and passes.tolist() == [12, 12]
    assert seen == list(range(1, 13))
    assert naive(network, draw, seeds, image, known).equal(result)


def test_what_is_known_takes_no_pass():
    network, draw, seeds, image, _ = parts(models.Gated(), (2, 1, 4, 4), 4)
    known = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    known[1, 0, 2] = False
    result, passes = jacobi(network, draw, seeds, image, known)
    assert passes[0] == 0 < passes[1] and result[known].equal(image[known])
    assert result.equal(naive(network, draw, seeds, image, known))


def test_progress_of_pixels():
    network, draw, seeds, image, known = parts(models.PixelCNN(outputs=4), (1, 1, 2, 3), 4)
    seen = []
    naive(network, draw, seeds, image, known, progress=seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_condition_goes_with_its_samples():
    model, image = prepared(models.Conditional()), torch.rand(3, 1, 4, 4).double()
    labels = torch.tensor([2, 0, 1])
    network = FullNetwork(model.train(), (3, 1, 4, 4), labels)
    with torch.no_grad():
        expected = model(image, labels)
    some = torch.tensor([2, 1])
    torch.testing.assert_close(network(image), expected)
    torch.testing.assert_close(network(image[some], some), expected[some])
    assert model.training


def test_conditions_in_containers():
    class Net(nn.Module):
        def forward(self, x, condition):
            return x + condition["a"][0][:, None, None, None] + condition["b"]

    x, a = torch.rand(3, 1, 2, 2), torch.rand(3)
    network = FullNetwork(Net(), (3, 1, 2, 2), {"a": (a,), "b": 2.0})
    some = torch.tensor([1])
    torch.testing.assert_close(network(x[some], some), x[some] + a[1] + 2)


def test_sequences():
    model = prepared(models.WaveNet())
    x = torch.rand(2, 1, 1, 9).double()
    with torch.no_grad():
        torch.testing.assert_close(FullNetwork(model, (2, 1, 9))(x)[:, :, 0], model(x[:, :, 0]))
