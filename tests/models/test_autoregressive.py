"""What all autoregressive models promise: causality, normalised probabilities, conditions, traces, files."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastgen.models import CheckpointError, GatedPixelCNN, PixelCNN, PixelCNNPlusPlus, WaveNet, load_state
from fastgen.ops import logistic_mixture

from ..modules import max_difference, randomize
from .small_autoregressive import SMALL, build, image

ROUNDING = 1e-13  # of sums of a few hundred terms of order 1 in float64


def pixels_read(model, x, row, column, condition=None):
    """[C, H, W] bool: the gradient of the logits of a pixel is not exactly 0 there."""
    x = x.clone().requires_grad_()
    logits = model(x, condition)[..., row, column]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    (grad,) = torch.autograd.grad((logits * weights).sum(), x)
    return (grad != 0).any(0)


@pytest.mark.parametrize("name", SMALL)
def test_logits_of_a_pixel_read_the_pixels_before_it_alone(name):
    model, x = build(name), image(name, n=8)  # so many that no ReLU is 0 for all
    height, width = x.shape[2:]
    places = [(0, 0), (0, width - 1), (height // 2, 0), (height // 2, width // 2), (height - 1, width - 1)]
    for row, column in places:
        read = pixels_read(model, x, row, column).flatten(1)  # [C, H W]
        at = row * width + column
        assert not read[:, at:].any(), (row, column)
        if at:
            assert read[:, at - 1 if column else at - width].all(), "what is beside or above has its part"


@pytest.mark.parametrize("name", ["gated", "gated_factorized", "snail", "plus_plus"])
def test_there_is_no_blind_spot(name):
    """Whatever is before, and near enough, is read; PixelCNN's one stack of 3 x 3 kernels misses what is above to the right."""
    model, x = build(name), image(name, n=8)
    width = x.shape[3]
    for row, column in ((3, width - 4), (4, width - 3)):
        read = pixels_read(model, x, row, column)[0]
        assert read[row - 2 : row, column - 2 : column + 3].all() and read[row, column - 2 : column].all()
        assert read[row - 1, column + 2]
    blind = build("pixel_cnn", input_kernel_size=3)
    assert not pixels_read(blind, image("pixel_cnn"), 4, 2)[0, 3, 4:].any()


@pytest.mark.parametrize("name", [name for name in SMALL if not name.startswith("plus_plus")])
def test_probabilities_of_all_images_add_up_to_one(name):
    channels, height, _ = SMALL[name][2]
    levels = 2
    model = build(name, levels=levels)
    size = (channels, min(height, 2), 3 - (channels > 1))
    every = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=math.prod(size))), dtype=torch.float64).view(
        -1, *size
    )
    nats = model.log_prob(every)
    assert nats.shape == (len(every),) and nats.std() > 0.02
    assert abs(nats.exp().sum().item() - 1) <= ROUNDING
    assert max_difference(model.bits_per_dim(every), -nats / math.log(2) / math.prod(size)) <= ROUNDING


@pytest.mark.parametrize("channels", [1, 3])
def test_probabilities_of_all_pixels_of_a_mixture_add_up_to_one(channels):
    levels, mixtures = 5, 3
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, mixtures * (3 if channels == 1 else 10), 1, 1, generator=generator, dtype=torch.float64)
    values = torch.linspace(-1, 1, levels, dtype=torch.float64)
    every = torch.tensor(list(itertools.product(values.tolist(), repeat=channels)), dtype=torch.float64)
    nats = logistic_mixture(logits.expand(len(every), -1, 1, 1), every[:, :, None, None], levels=levels)
    assert abs((-nats).exp().sum().item() - 1) <= ROUNDING


@pytest.mark.parametrize("name", ["plus_plus", "plus_plus_rgb"])
def test_log_prob_of_a_mixture_is_the_sum_over_pixels(name):
    model, x = build(name), image(name)
    logits = model(x)
    expected = sum(
        logistic_mixture(logits[..., i : i + 1, j : j + 1], x[..., i : i + 1, j : j + 1], levels=model.levels)
        for i in range(x.shape[2])
        for j in range(x.shape[3])
    )
    assert max_difference(-model.log_prob(x), expected) <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("name", SMALL)
def test_a_trace_is_the_model_for_other_images_too(name):
    model = build(name, num_classes=3, condition_channels=2)
    x, labels = image(name), torch.tensor([0, 2])
    area = torch.randn(len(x), 2, *x.shape[2:], generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    with torch.no_grad():
        graph = make_fx(lambda x, labels, area: model(x, (labels, area)))(x, labels, area)
        other = image(name, seed=5)
        expected = model(other, (labels + 0, area * 2))
        assert max_difference(graph(other, labels, area * 2), expected) == 0
        assert max_difference(expected, model(x, (labels, area))) > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_conditions_count_and_keep_the_order(name):
    x = image(name)
    for options in ({"num_classes": 3}, {"condition_channels": 2}, {"num_classes": 3, "condition_channels": 2}):
        model = build(name, **options)
        area = torch.randn(len(x), 2, *x.shape[2:], generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        first = {1: torch.tensor([0, 1]), 2: area, 3: (torch.tensor([0, 1]), area)}
        second = {1: torch.tensor([2, 1]), 2: area + torch.tensor([1.0, 0.0])[:, None, None, None]}
        second[3] = (second[1], area)
        kind = ("num_classes" in options) + 2 * ("condition_channels" in options)
        a, b = model(x, first[kind]), model(x, second[kind])
        assert max_difference(a[0], b[0]) > 1e-3 and max_difference(a[1], b[1]) == 0, "sample by sample"
        row, column = x.shape[2] // 2, x.shape[3] // 2
        read = pixels_read(model, x, row, column, first[kind]).flatten(1)
        assert not read[:, row * x.shape[3] + column :].any()


def test_a_fresh_model_does_not_know_the_condition():
    cls, config, _ = SMALL["gated"]
    model = cls(**config, num_classes=4).double()
    x = image("gated")
    assert max_difference(model(x, torch.tensor([0, 1])), model(x, torch.tensor([3, 2]))) == 0


BAD_CALLS = [
    ({}, (1, 2, 7, 6), None, r"x must be \[N, 1, H, W\], got shape \(1, 2, 7, 6\)"),
    ({}, (1, 7, 6), None, r"x must be \[N, 1, H, W\], got shape \(1, 7, 6\)"),
    ({}, (2, 1, 7, 6), torch.tensor([1, 2]), r"condition must be None .*, got torch.int64 of shape \(2,\)"),
    ({"num_classes": 3}, (2, 1, 7, 6), None, r"condition must be \[N\] integers below 3, got None"),
    (
        {"num_classes": 3},
        (2, 1, 7, 6),
        torch.tensor([1]),
        r"labels in condition must be \[N\] = \[2\], got shape \(1,\)",
    ),
    (
        {"condition_channels": 2},
        (2, 1, 7, 6),
        torch.tensor([1, 1]),
        r"condition must be a map \[N, 2, H, W\], got torch.int64",
    ),
    (
        {"condition_channels": 2},
        (2, 1, 7, 6),
        torch.zeros(2, 2, 7, 5),
        r"the map in condition must be \[2, 2, 7, 6\], got shape \(2, 2, 7, 5\)",
    ),
    (
        {"num_classes": 3, "condition_channels": 2},
        (2, 1, 7, 6),
        torch.zeros(2, 2, 7, 6),
        r"condition must be \[N\] integers below 3 and a map \[N, 2, H, W\], got torch.float32 of shape \(2, 2, 7, 6\)",
    ),
]


@pytest.mark.parametrize(("options", "shape", "condition", "message"), BAD_CALLS)
def test_bad_arguments_of_a_call(options, shape, condition, message):
    with pytest.raises(ValueError, match="GatedPixelCNN: " + message):
        build("gated", torch.float32, **options)(torch.zeros(shape), condition)


BAD_CONFIGS = [
    (GatedPixelCNN, {"channels": 0}, "channels must be a positive integer, got 0"),
    (GatedPixelCNN, {"kernel_size": 4}, "kernel_size must be odd and at least 3, got 4"),
    (GatedPixelCNN, {"input_kernel_size": 1}, "input_kernel_size must be odd and at least 3, got 1"),
    (GatedPixelCNN, {"dilations": [1, 0]}, r"dilations must be positive integers, one a layer, got \[1, 0\]"),
    (GatedPixelCNN, {"factorized": True}, "head_channels must be given if and only if factorized"),
    (GatedPixelCNN, {"distribution": "normal"}, "distribution must be one of .*, got 'normal'"),
    (GatedPixelCNN, {"distribution": "logistic_mixture"}, "distribution must be 'categorical' or 'bernoulli'"),
    (GatedPixelCNN, {"distribution": "bernoulli"}, "levels must be 2 for distribution='bernoulli', got 256"),
    (GatedPixelCNN, {"levels": 1}, "levels must be at least 2 for distribution='categorical', got 1"),
    (GatedPixelCNN, {"num_classes": 0}, "num_classes must be None or a positive integer, got 0"),
    (GatedPixelCNN, {"in_channels": True}, "in_channels must be a positive integer, got True"),
    (PixelCNN, {"kernel_size": 2}, "kernel_size must be odd, got 2"),
    (PixelCNN, {"block": "wide"}, "block must be one of .*, got 'wide'"),
    (PixelCNN, {"channels": 7}, "channels must be even for block='bottleneck', got 7"),
    (PixelCNNPlusPlus, {"in_channels": 2}, "in_channels must be 1 or 3, got 2"),
    (PixelCNNPlusPlus, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    (WaveNet, {"dilations": []}, r"dilations must be positive integers, one a layer, got \[\]"),
]


@pytest.mark.parametrize(("cls", "config", "message"), BAD_CONFIGS)
def test_bad_configs(cls, config, message):
    with pytest.raises(ValueError, match=f"{cls.__name__}: {message}"):
        cls(**config)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"height and width of x must be divisible by 4, got shape \(1, 1, 8, 6\)"):
        build("plus_plus")(torch.zeros(1, 1, 8, 6))
    with pytest.raises(ValueError, match=r"x must be of height 1, \[N, 1, 1, T\], got shape \(1, 1, 2, 6\)"):
        build("wavenet")(torch.zeros(1, 1, 2, 6))


@pytest.mark.parametrize("name", SMALL)
def test_a_file_and_back(name, tmp_path):
    model, x = build(name, torch.float32, num_classes=3), image(name, dtype=torch.float32)
    labels = torch.tensor([0, 2])
    model.save(tmp_path / "m.safetensors", {"note": "x"})
    with torch.no_grad():
        expected = model(x, labels)
        other = type(model).load(tmp_path / "m.safetensors")
        assert torch.equal(other(x, labels), expected) and not other.training and other.config == model.config
        assert load_state(tmp_path / "m.safetensors")[1]["note"] == "x"
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(clone(x, labels), expected)
        # other strides, other order of sums
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)(
            x.to(memory_format=torch.channels_last), labels
        )
        assert max_difference(last, expected) <= 1e-4 * expected.abs().max()
    with torch.device("meta"):
        assert type(model).from_config(model.config)(x.to("meta"), labels.to("meta")).shape == expected.shape
    assert type(model).__name__ in str(model)
    with pytest.raises(ValueError, match=r"from_config: unknown keys \['depth'\]; the known ones are"):
        type(model).from_config({**model.config, "depth": 3})


def test_a_file_of_another_model(tmp_path):
    build("gated", torch.float32).save(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="the file holds a GatedPixelCNN, not a PixelCNN"):
        PixelCNN.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", SMALL)
def test_own_weights_say_the_sizes(name):
    cls = SMALL[name][0]
    said = ("dilations", "levels", "unit_range", "skip_gain", "block", "dropout")
    model = build(name, num_classes=3, condition_channels=2)
    options = {key: value for key, value in model.config.items() if key in said}
    again = cls.from_state_dict(model.state_dict(), **options)
    assert again.config == model.config
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_weights_of_something_else():
    with pytest.raises(
        ValueError, match=r"PixelCNN\.from_state_dict: not the weights of such a model: no 'first.weight'"
    ):
        PixelCNN.from_state_dict({"weight": torch.zeros(3)})
    state = build("pixel_cnn").state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        PixelCNN.from_state_dict(state, channels=4)


def test_a_sequence_is_an_image_of_height_one():
    model = randomize(
        WaveNet(2, 4, skip_channels=5, dilations=[1, 2], levels=3, condition_channels=2, num_classes=2)
    ).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(3, (2, 2, 9), generator=generator).double() - 1
    area, labels = torch.randn(2, 2, 9, generator=generator, dtype=torch.float64), torch.tensor([0, 1])
    logits = model(x, (labels, area))
    assert logits.shape == (2, 3, 2, 9)
    assert torch.equal(logits, model(x.unsqueeze(2), (labels, area.unsqueeze(2))).squeeze(3))
    assert torch.equal(model.log_prob(x, (labels, area)), model.log_prob(x.unsqueeze(2), (labels, area.unsqueeze(2))))


def test_the_field_of_a_wavenet():
    """1 + sum of (kernel - 1) dilations samples, the last of them the one before."""
    model = build("wavenet", dilations=[1, 2, 4])
    read = pixels_read(model, image("wavenet"), 0, 13)[0, 0]
    assert read.nonzero().flatten().tolist() == list(range(13 - 2 - (1 + 2 + 4) + 0, 13))
