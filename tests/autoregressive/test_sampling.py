"""`sample` as a user calls it: every method draws the same pixels, of its seed alone, and what does not fit is said."""

import copy
import importlib
import io
import sys
import warnings

import pytest
import torch
from torch import nn

from fastgen.autoregressive import NotPlannable, Steps, sample, sampling
from fastgen.autoregressive.capture import capture
from fastgen.models import GatedPixelCNN

from ..models.small_autoregressive import SMALL, build
from ..modules import max_difference, randomize
from . import models
from .models import prepared
from .test_causality import ByColor

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


def other_weights(model, how):
    """New weights for a model, by each of the ways there are."""
    other = randomize(copy.deepcopy(model), seed=7)
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            if how == "in place":
                ours.copy_(theirs)
            elif how == "data":
                ours.data = theirs.data.clone()
            elif how == "in place of data":
                ours.data.copy_(theirs.data)
    if how == "load_state_dict":
        model.load_state_dict(other.state_dict())
    if how == "parameters replaced":
        model.load_state_dict(other.state_dict(), assign=True)
    if how == "modules replaced":
        for name, child in other.named_children():
            setattr(model, name, child)
    return other


HOW = ("in place", "data", "in place of data", "load_state_dict", "parameters replaced", "modules replaced")


@pytest.mark.parametrize("how", HOW)
def test_changed_weights_are_seen(how):
    model, shape = build("gated"), shape_of("gated")
    before = sample(model, shape, seeds=range(3))
    other = other_weights(model, how)
    after = sample(model, shape, seeds=range(3))
    assert after.equal(sample(other, shape, seeds=range(3), method="naive")) and not after.equal(before)


def test_a_replaced_module_without_weights_is_seen():
    model = prepared(nn.Sequential(models.Masked("a", 1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    options = {"distribution": "categorical", "values": range(4), "seeds": range(3)}
    before = sample(model, (3, 1, 5, 5), **options)
    model[1] = nn.Tanh()
    after = sample(model, (3, 1, 5, 5), **options)
    assert after.equal(sample(model, (3, 1, 5, 5), method="naive", **options)) and not after.equal(before)


def test_labels_are_planned_once_each(monkeypatch):
    model, captured = build("gated", num_classes=5), []
    planning = importlib.import_module("fastgen.autoregressive.plan")  # the function of that name hides it
    monkeypatch.setattr(
        planning, "capture", lambda *args, **kw: captured.append(kw["condition"]) or capture(*args, **kw)
    )
    for labels in ([3, 1, 3], [1, 3], [3], [4, 1], [0, 4, 3], [2, 0, 1]):
        shape, condition = (len(labels), 1, 4, 3), torch.tensor(labels)
        drawn = sample(model, shape, condition=condition, seeds=range(len(labels)), method="cached")
        assert drawn.equal(sample(model, shape, condition=condition, seeds=range(len(labels)), method="naive"))
    assert [labels.tolist() for labels in captured] == [[1, 3], [1, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    sample(model, (1, 1, 4, 3), condition=torch.tensor([2]), seeds=[0], method="cached")
    assert captured[-1].tolist() == [2], "of changed weights nothing is kept"


def test_a_changed_condition_is_seen():
    model, shape = build("gated", num_classes=3), shape_of("gated")
    labels = LABELS.clone()
    before = sample(model, shape, condition=labels, seeds=range(3))
    labels.copy_(torch.tensor([0, 1, 2]))
    after = sample(model, shape, condition=labels, seeds=range(3))
    assert after.equal(sample(model, shape, condition=labels, seeds=range(3), method="naive"))
    assert not after.equal(before)


def test_the_mode_of_the_model_is_its_own():
    model = build("plus_plus", dropout=0.5)
    expected = sample(model, shape_of("plus_plus"), seeds=range(3))
    model.train()
    model.down.eval()
    assert three_ways(model, shape_of("plus_plus"), seeds=range(3)).equal(expected)
    assert model.training and model.out.training and not model.down.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_in_inference_mode():
    with torch.inference_mode():
        model = build("gated")
        drawn = three_ways(model, shape_of("gated"), seeds=range(3))
        model.out.bias += torch.randn(len(model.out.bias)).to(model.out.bias)  # counted by nobody
        assert not three_ways(model, shape_of("gated"), seeds=range(3)).equal(drawn)
    assert not three_ways(build("gated", levels=6), shape_of("gated"), seeds=range(3)).equal(drawn)


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


class Unplannable(nn.Module):
    """A sort over the channels: no position of another is read, and no plan knows how to."""

    def __init__(self):
        super().__init__()
        self.model = models.PixelCNN(outputs=4)

    def forward(self, x):
        return self.model(x).sort(1).values


def test_what_cannot_be_planned_is_drawn_by_jacobi_and_says_so():
    model = prepared(Unplannable())
    options = {"distribution": "categorical", "values": range(4), "seeds": range(2)}
    with pytest.warns(UserWarning, match="sort.*Jacobi decoding takes the place"):
        drawn = sample(model, (2, 1, 5, 6), **options)
    assert drawn.equal(sample(model, (2, 1, 5, 6), method="naive", **options))
    with pytest.raises(NotPlannable, match="sort"):
        sample(model, (2, 1, 5, 6), method="cached", **options)


def test_nothing_is_said_where_it_can_be_planned():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(build("snail"), shape_of("snail"), seeds=range(3))


@pytest.mark.parametrize("name", ["gated_two_channels", "plus_plus_rgb", "wavenet"])
def test_what_is_watched_is_the_same(name, monkeypatch):
    """Pixel by pixel, with a bar, where somebody sees it."""
    model, shape = build(name), shape_of(name)
    options = {"seeds": range(3), "prefix": torch.zeros(1, shape[1], shape[2] // 2, shape[3]), "return_log_prob": True}
    drawn, log_prob = sample(model, shape, **options)
    steps = []
    monkeypatch.setattr(sampling, "LONG", 0)
    monkeypatch.setattr(sampling.Plan, "steps", lambda self, n: steps.append(n) or Steps(self.program, n))
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    watched, its_log_prob = sample(model, shape, **options)
    assert steps == [3] and watched.equal(drawn) and max_difference(log_prob, its_log_prob) <= 1e-12
    sample(model, shape, progress=False, **options)
    assert steps == [3]


def test_colors_in_turn_that_are_watched(monkeypatch):
    model, options = prepared(ByColor((0, 1, 2), levels=4)), {"values": range(4), "seeds": [5, 6]}
    drawn, log_prob = sample(model, (2, 3, 4, 5), return_log_prob=True, **options)
    monkeypatch.setattr(sampling, "LONG", 0)
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True
    watched, its_log_prob = sample(model, (2, 3, 4, 5), return_log_prob=True, **options)
    assert watched.equal(drawn) and max_difference(log_prob, its_log_prob) <= 1e-12


SHAPE, GIVEN = (2, 1, 7, 6), torch.zeros(2, 1, 7, 6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "fast"}, ValueError, "method must be one of .*, got 'fast'"),
        ({"shape": (2, 7)}, ValueError, r"shape must be \(N, C, H, W\) or \(N, C, T\), the sizes positive, got \(2, 7\)"),
        ({"shape": (2, 1, 0, 6)}, ValueError, r"the sizes positive, got \(2, 1, 0, 6\)"),
        ({"shape": (2, 3, 7, 6)}, ValueError, r"GatedPixelCNN: x must be \[N, 1, H, W\], got shape"),
        ({"seeds": [1]}, ValueError, r"seeds must be one an image \(2\), got 1"),
        ({"seeds": [1.5, 2]}, TypeError, "sample: seeds must be integers of at most 64 bits"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and not negative, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite and not negative, got nan"),
        ({"top_k": 0}, ValueError, "top_k must be an integer of at least 1, or None, got 0"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], or None, got 0.0"),
        ({"prefix": torch.zeros(2, 1, 8, 6)}, ValueError, "prefix has 8 rows, the image 7"),
        ({"prefix": torch.zeros(2, 1, 3, 5)}, ValueError, r"prefix must be \[2 or 1, 1, h, 6\], got shape \(2, 1, 3, 5\)"),
        ({"prefix": torch.zeros(3, 1, 3, 6)}, ValueError, r"prefix must be .*, got shape \(3, 1, 3, 6\)"),
        ({"prefix": torch.zeros(3, 6)}, ValueError, r"prefix must be .*, got shape \(3, 6\)"),
        ({"image": GIVEN}, ValueError, "image and known must be given together"),
        ({"image": GIVEN, "known": GIVEN}, TypeError, "known must be a bool tensor, got torch.float32"),
        ({"image": GIVEN, "known": GIVEN[:, :, :3] > 0}, ValueError, r"must broadcast to \(2, 1, 7, 6\)"),
        ({"image": GIVEN, "known": GIVEN > 0, "prefix": GIVEN}, ValueError, "give prefix, or image and known, not both"),
        ({"prefix": GIVEN[:, :, :2] + float("nan")}, ValueError, "not finite|must be finite"),
        ({"distribution": "normal"}, ValueError, "distribution must be one of .*, got 'normal'"),
        ({"distribution": "logistic_mixture"}, ValueError, "'logistic_mixture' does not fit 5 logits a pixel of 1 color"),
        ({"values": [1, 2]}, ValueError, r"values must be one a level \(5\), got 2"),
        ({"condition": torch.zeros(2, dtype=torch.int64)}, ValueError, "GatedPixelCNN: condition must be None"),
        ({"method": "naive", "weights_dtype": torch.bfloat16}, ValueError, "weights_dtype is for the cached engine"),
    ],
)  # fmt: skip
def test_errors_name_what_does_not_fit(options, error, message):
    options = {"shape": SHAPE, "seeds": range(2), **options}
    with pytest.raises(error, match=message):
        sample(build("gated"), options.pop("shape"), **options)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_weights_that_are_not_finite(method):
    model = build("gated")
    model.layers[1].link.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite|must be finite"):
        sample(model, shape_of("gated"), seeds=range(3), method=method)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (models.PixelCNN(outputs=4), {}, "distribution must be given: 4 logits a pixel"),
        (models.PixelCNN(outputs=4), {"distribution": "categorical"}, "values must be given: .* its 4 levels"),
        (models.PixelCNN(outputs=4), {"distribution": "bernoulli"}, "'bernoulli' does not fit 4 logits"),
        (models.PixelCNN(outputs=1), {"values": [1.0]}, r"values must be one a level \(2\), got 1"),
        (models.PixelCNN(outputs=6), {"distribution": "logistic_mixture", "top_k": 2}, "top_k and top_p are not for mixtures"),
    ],
)  # fmt: skip
def test_models_that_do_not_say_what_their_logits_are(model, options, message):
    with pytest.raises(ValueError, match=f"^sample: .*{message}"):
        sample(prepared(copy.deepcopy(model)), (2, 1, 4, 4), seeds=range(2), **options)


def test_a_mixture_knows_all_colors_of_a_pixel_or_none():
    known = torch.zeros(2, 3, 8, 4, dtype=torch.bool)
    known[:, 1, 2, 2] = True
    with pytest.raises(ValueError, match="known must be the same for all colors of a pixel"):
        sample(build("plus_plus_rgb"), (2, 3, 8, 4), image=torch.zeros(2, 3, 8, 4), known=known)


def test_no_model():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        sample(lambda x: x, (1, 1, 2, 2))


@pytest.mark.parametrize("rows", [3, 8])
def test_a_longer_sequence_than_there_is(rows):
    sample(build("wavenet"), (1, 1, 8), prefix=torch.zeros(1, 1, rows))
    with pytest.raises(ValueError, match="prefix has 9 samples, the sequence 8"):
        sample(build("wavenet"), (1, 1, 8), prefix=torch.zeros(1, 1, 9))


def test_a_model_of_a_real_size():
    """Two rows of an image of 28 x 28, by the layers of the course's tutorial."""
    model = randomize(GatedPixelCNN(channels=64, levels=16)).eval()
    known = torch.ones(1, 1, 28, 28, dtype=torch.bool)
    known[:, :, 1:3] = False
    image = torch.zeros(1, 1, 28, 28)
    three_ways(model, (1, 1, 28, 28), METHODS[:2], seeds=[1], image=image, known=known, temperature=0.5)
