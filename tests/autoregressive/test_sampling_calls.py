"""`sample` as it is called: weights, conditions and modes that change, what cannot be planned, what is watched, errors."""

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

from ..models.small_autoregressive import build
from ..modules import max_difference, randomize
from . import models
from .models import prepared
from .test_causality import ByColor
from .ways import LABELS, METHODS, shape_of, three_ways


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
