"""`sample`: every method draws the same pixels, of its seed alone, as likely as the full network says."""

import copy

import pytest
import torch

from fastgen.autoregressive import sample
from fastgen.models import GatedPixelCNN

from ..models.small_autoregressive import SMALL, build
from ..modules import max_difference, randomize
from . import models
from .models import prepared
from .test_causality import ByColor
from .ways import BOUND, METHODS, shape_of, three_ways, with_condition


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("name", SMALL)
def test_every_method_draws_the_same_pixels(name, dtype):
    methods = METHODS if dtype == torch.float64 else METHODS[:2]
    drawn = three_ways(build(name, dtype), shape_of(name), methods, seeds=[3, -1, 2**64 - 1])
    assert drawn.dtype == dtype and len(drawn.unique()) > 1 and drawn.abs().max() <= 1


@pytest.mark.parametrize("kind", ["labels", "map", "both"])
@pytest.mark.parametrize(
    "name", ["pixel_cnn", "pixel_cnn_plain", "gated", "gated_factorized", "plus_plus", "snail", "wavenet"]
)
def test_what_they_are_conditioned_on(name, kind):
    model, condition = with_condition(name, kind)
    drawn = three_ways(model, shape_of(name), METHODS[:2], condition=condition, seeds=range(3))
    options = {"condition": condition, "prefix": drawn[:1], "return_log_prob": True}
    first, second, _ = sample(model, shape_of(name), **options)[1]  # of one image
    assert not first.equal(second)


@pytest.mark.parametrize("kind", [None, "labels", "both"])
def test_sequences(kind):
    model, condition = with_condition("wavenet", kind) if kind else (build("wavenet"), None)
    as_images = sample(model, (3, 1, 1, 14), condition=condition, seeds=range(3))
    if kind == "both":
        condition = condition[0], condition[1][:, :, 0]
    drawn, log_prob = sample(model, (3, 1, 14), condition=condition, seeds=range(3), return_log_prob=True)
    assert drawn.equal(as_images[:, :, 0]) and log_prob.shape == (3, 14)
    assert drawn.equal(three_ways(model, (3, 1, 14), condition=condition, seeds=range(3)))
    prefixed = three_ways(model, (3, 1, 14), condition=condition, seeds=range(9, 12), prefix=drawn[:, :, :5])
    assert prefixed[:, :, :5].equal(drawn[:, :, :5]) and not prefixed.equal(drawn)
    known = torch.zeros(14, dtype=torch.bool)
    known[5:] = True
    filled = three_ways(model, (3, 1, 14), condition=condition, seeds=range(9, 12), image=drawn, known=known)
    assert filled[..., 5:].equal(drawn[..., 5:]) and not filled.equal(drawn)


@pytest.mark.parametrize("levels_first", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 1)])
def test_colors_that_are_drawn_in_turn(order, levels_first):
    model = prepared(ByColor(order, levels=4, levels_first=levels_first))
    if not levels_first:  # three colors and four levels tell their dimensions apart
        assert model.levels not in order
    shape, values = (2, len(order), 4, 5), [0.0, 1.0, 2.0, 3.0]
    drawn = three_ways(model, shape, values=values, seeds=[5, 6])
    assert set(drawn.unique().tolist()) == set(values)


@pytest.mark.parametrize(
    ("model", "shape", "options"),
    [
        (models.PixelCNN(outputs=4), (2, 1, 6, 7), {"distribution": "categorical", "values": [0.0, 0.5, 1.0, 2.0]}),
        (models.PixelCNN(outputs=1), (2, 1, 6, 7), {}),
        (models.PixelCNN(outputs=3, colors=3), (2, 3, 6, 7), {"values": (-1.0, 1.0), "distribution": "bernoulli"}),
        (models.Gated(colors=3), (2, 3, 5, 6), {"values": range(4)}),
        (models.Down(outputs=20), (2, 3, 8, 8), {"distribution": "logistic_mixture"}),
        (models.Down(outputs=10), (2, 3, 8, 4), {"distribution": "logistic_mixture", "levels": 32}),
        (models.Attending(outputs=4), (2, 1, 5, 6), {"values": torch.arange(4.0), "distribution": "categorical"}),
        (models.WaveNet(outputs=6), (2, 1, 17), {"distribution": "logistic_mixture", "levels": 256}),
        (models.Embedded(levels=5), (2, 2, 5, 6), {"values": range(5)}),
    ],
    ids=["levels", "bernoulli", "bernoulli in colors", "named", "mixture", "rounded", "attention", "sequence", "embedded"],
)  # fmt: skip
def test_models_of_others(model, shape, options):
    model = prepared(copy.deepcopy(model))
    drawn, log_prob = sample(model, shape, seeds=[8, 9], return_log_prob=True, **options)
    three_ways(model, shape, seeds=[8, 9], **options)
    other = sample(model, shape, seeds=[8, 9], method="naive", return_log_prob=True, **options)[1]
    assert max_difference(log_prob, other) <= 1e-9
    if "values" in options:
        assert set(drawn.unique().tolist()) <= {float(value) for value in options["values"]}


@pytest.mark.parametrize("size", [(1, 1), (1, 16), (16, 1), (2, 3), (16, 16), (13, 7)])
@pytest.mark.parametrize("n", [1, 5])
def test_sizes_and_batches(size, n):
    model = build("gated", torch.float64)
    drawn = three_ways(model, (n, 1, *size), METHODS[: 3 if size[0] * size[1] < 20 else 2], seeds=range(n))
    assert sample(model, (1, 1, *size), seeds=[n - 1]).equal(drawn[-1:])


def test_no_images():
    drawn, log_prob = sample(build("gated"), (0, 1, 4, 5), seeds=[], return_log_prob=True)
    assert drawn.shape == (0, 1, 4, 5) and log_prob.shape == (0, 4, 5)


@pytest.mark.parametrize("name", ["gated", "plus_plus_rgb", "snail"])
@pytest.mark.parametrize("rows", [0, 1, 3, "all"])
def test_a_prefix_is_kept_and_what_follows_is_drawn_of_it(name, rows):
    model, shape = build(name), shape_of(name)
    rows = shape[2] if rows == "all" else rows
    whole = sample(model, shape, seeds=range(3))
    half = whole[:, :, :rows].clone()
    drawn = three_ways(model, shape, METHODS[:2] if rows < 3 else METHODS, seeds=range(10, 13), prefix=half)
    assert drawn[:, :, :rows].equal(half) and drawn.equal(whole) == (rows == shape[2])
    assert sample(model, shape, seeds=range(3), prefix=half).equal(whole)  # of the uniforms of its places
    one = sample(model, shape, seeds=[4] * 3, prefix=half[:1])
    assert one[0].equal(one[1]) and one[:, :, :rows].equal(half[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize("name", ["gated", "plus_plus_rgb", "pixel_cnn_residual_two_channels"])
def test_known_pixels_stay(name):
    model, shape = build(name), shape_of(name)
    image = sample(model, shape, seeds=range(3))
    known = torch.rand(1, 1, *shape[2:], generator=torch.Generator().manual_seed(0)) < 0.4
    drawn = three_ways(model, shape, seeds=range(7, 10), image=image, known=known)
    everywhere = known.expand(shape)
    assert drawn[everywhere].equal(image[everywhere]) and not drawn.equal(image)
    image[~everywhere] = -0.25  # what is not known is not read
    assert sample(model, shape, seeds=range(7, 10), image=image, known=known).equal(drawn)
    if name.startswith("pixel_cnn"):  # each color for itself
        known = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
        drawn = three_ways(model, shape, seeds=range(7, 10), image=image, known=known)
        assert drawn[known].equal(image[known])


@pytest.mark.isa
@pytest.mark.parametrize("name", ["gated", "plus_plus_rgb", "snail", "wavenet"])
def test_an_image_depends_on_its_seed_alone(name):
    model, seeds = build(name, torch.float32), [11, 12, 13, 14, 15]
    threads = torch.get_num_threads()
    together = sample(model, shape_of(name, 5), seeds=seeds)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert sample(model, shape_of(name, 5), seeds=seeds).equal(together), number
            turned = sample(model, shape_of(name, 5), seeds=torch.tensor(seeds[::-1]))
            assert turned.flip(0).equal(together), number
            for i in (0, 4):
                assert sample(model, shape_of(name, 1), seeds=[seeds[i]])[0].equal(together[i])
    finally:
        torch.set_num_threads(threads)
    assert len({image.numpy().tobytes() for image in together}) == 5


def test_seeds_of_torch_where_none_are_given():
    model, shape = build("gated"), shape_of("gated")
    torch.manual_seed(5)
    first, second = sample(model, shape), sample(model, shape)
    torch.manual_seed(5)
    assert sample(model, shape).equal(first) and not second.equal(first)


@pytest.mark.parametrize("name", ["gated", "gated_two_channels", "gated_bernoulli", "plus_plus", "plus_plus_rgb"])
def test_temperature_zero_takes_the_likeliest(name):
    model, shape = build(name), shape_of(name)
    drawn = three_ways(model, shape, METHODS[:2], temperature=0, seeds=range(3))
    assert drawn[0].equal(drawn[1])
    if model.distribution == "categorical":
        with torch.no_grad():
            assert model.indices(drawn).equal(model(drawn).argmax(1))
    hot = three_ways(model, shape, METHODS[:2], temperature=3.0, seeds=range(3))
    assert not hot.equal(sample(model, shape, seeds=range(3)))


@pytest.mark.parametrize("name", ["gated", "gated_two_channels"])
@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_k": 2}, {"top_p": 0.4}, {"top_k": 3, "top_p": 0.9}], ids=str)
def test_levels_that_are_cut_are_not_drawn(name, cut):
    model, shape = build(name), shape_of(name, 8)
    drawn = three_ways(model, shape, METHODS[:2], seeds=range(8), temperature=1.5, **cut)
    with torch.no_grad():
        probability = (model(drawn) / 1.5).softmax(1)
    chosen = probability.gather(1, model.indices(drawn)[:, None])
    larger = probability > chosen
    assert (larger.sum(1) < cut.get("top_k", 5)).all()
    assert ((probability * larger).sum(1) < cut.get("top_p", 1.0) + 1e-12).all()
    if cut == {"top_k": 1}:
        assert drawn.equal(sample(model, shape, seeds=range(8), temperature=0))


@pytest.mark.parametrize("method", ["cached", "jacobi"])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("name", SMALL)
def test_log_probabilities_are_those_of_the_full_network(name, dtype, method):
    """At temperature 1 and with nothing cut, of what is given too."""
    model, shape = build(name, dtype), shape_of(name)
    prefix = sample(model, shape, seeds=range(3))[:, :, : shape[2] // 2]
    options = {"prefix": prefix, "temperature": 0.7, "seeds": range(3), "method": method}
    drawn, log_prob = sample(model, shape, return_log_prob=True, **options)
    assert drawn.equal(sample(model, shape, **options)) and log_prob.shape == (3, *shape[2:])
    with torch.no_grad():
        expected = build(name, torch.float64).log_prob(drawn.double())
    pixels = shape[2] * shape[3]
    assert max_difference(log_prob.flatten(1).sum(1).double(), expected) <= 10 * pixels * BOUND[dtype]
    if model.distribution == "categorical":
        with torch.no_grad():
            each = model(drawn).log_softmax(1).gather(1, model.indices(drawn)[:, None])[:, 0].sum(1)
        assert max_difference(log_prob, each) <= 10 * BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gated", "plus_plus_rgb", "snail"])
def test_models_in_half_precision(name, dtype):
    """Of their rounded weights all is computed in float32; what they make of weights and positions alone they round themselves."""
    model, shape = build(name, dtype), shape_of(name)
    drawn, log_prob = sample(model, shape, seeds=range(3), method="cached", return_log_prob=True)
    assert drawn.dtype == dtype and log_prob.dtype == torch.float32
    exact = copy.deepcopy(model).double()
    _, expected = sample(exact, shape, prefix=drawn.double(), return_log_prob=True)
    assert (log_prob - expected).abs().mean() <= 2 * torch.finfo(dtype).eps
    if name == "gated":  # none of the latter
        levels = model.indices(drawn.double())
        assert levels.equal(model.indices(sample(exact, shape, seeds=range(3))))
        assert drawn.equal((2 * levels / (model.levels - 1) - 1).to(dtype))


@pytest.mark.parametrize("name", ["gated", "plus_plus_rgb"])
def test_weights_kept_in_bfloat16(name):
    model, shape = build(name, torch.float32), shape_of(name)
    drawn = sample(model, shape, seeds=range(3), weights_dtype=torch.bfloat16)
    assert drawn.dtype == torch.float32 and drawn.equal(
        sample(model, shape, seeds=range(3), weights_dtype=torch.bfloat16)
    )
    _, log_prob = sample(model, shape, prefix=drawn, weights_dtype=torch.bfloat16, return_log_prob=True)
    with torch.no_grad():
        expected = model.log_prob(drawn)
    error = (log_prob.flatten(1).sum(1) - expected).abs().max() / expected.abs().max()
    assert 0 < error <= 2e-2
    assert sample(model, shape, seeds=range(3)).equal(sample(model, shape, seeds=range(3), method="naive"))


def test_a_model_of_a_real_size():
    """Two rows of an image of 28 x 28, by the layers of the course's tutorial."""
    model = randomize(GatedPixelCNN(channels=64, levels=16)).eval()
    known = torch.ones(1, 1, 28, 28, dtype=torch.bool)
    known[:, :, 1:3] = False
    image = torch.zeros(1, 1, 28, 28)
    three_ways(model, (1, 1, 28, 28), METHODS[:2], seeds=[1], image=image, known=known, temperature=0.5)
