"""Stand-ins for the projects of PixelCNNs, as `foreign_autoregressive` writes them: layers, and sampling under the same seed."""

import copy
import pickle
import warnings
from abc import ABC

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen import _dispatch
from fastgen.autoregressive import sample
from fastgen.integrations.stand_in import mixin_of

from ..modules import randomize
from . import foreign_autoregressive as foreign
from .foreign_autoregressive import plus_plus, tutorial
from .numerics import WINOGRAD, assert_accelerated, error


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


LAYERS = {
    "causal, first": (lambda: foreign.CausalConv2d(True, 6, 16, 5, padding=2), [(6,)], "CausalConv2d"),
    "causal, later": (lambda: foreign.CausalConv2d(False, 8, 16, (3, 5), padding=(1, 2)), [(8,)], "CausalConv2d"),
    "causal, dilated, in groups": (
        lambda: foreign.CausalConv2d(False, 16, 32, 3, padding="same", dilation=2, groups=2, bias=False), [(16,)], "CausalConv2d",
    ),
    "gate": (lambda: foreign.GatedActivation(), [(12,)], "GatedActivation"),
    "gate of nn.Tanh": (lambda: foreign.GatedActivation(nn.Tanh()), [(12,)], "GatedActivation"),
    "gate without activation": (lambda: foreign.GatedActivation(nn.Identity()), [(12,)], "GatedActivation"),
    "attention": (lambda: foreign.CausalAttention(8, 2, 12, 16), [(8,)], "CausalAttention"),
    "attention to others": (lambda: foreign.CausalAttention(8, 1, 3, 5, True, 2), [(8,), (2,)], "CausalAttention"),
    "CompressAI, first": (lambda: foreign.MaskedConv2d(6, 16, 5, padding=2), [(6,)], "MaskedConv2d"),
    "CompressAI, later": (lambda: foreign.MaskedConv2d(6, 16, 5, padding=2, mask_type="B"), [(6,)], "MaskedConv2d"),
    "vertical": (lambda: tutorial.VerticalStackConvolution(6, 16, 5), [(6,)], "VerticalStackConvolution"),
    "horizontal": (
        lambda: tutorial.HorizontalStackConvolution(6, 16, mask_center=True, dilation=4), [(6,)], "HorizontalStackConvolution",
    ),
    "gated stacks": (lambda: tutorial.GatedMaskedConv(8), [(8,), (8,)], "GatedMaskedConv"),
    "block of PixelCNN++": (lambda: plus_plus.gated_resnet(8, plus_plus.concat_elu), [(8,)], "gated_resnet"),
    "block of PixelCNN++ with a skip": (
        lambda: plus_plus.gated_resnet(8, lambda x: plus_plus.concat_elu(x), 2), [(8,), (16,)], "gated_resnet",
    ),
}  # fmt: skip


def flat(outputs) -> torch.Tensor:
    return torch.cat([t.flatten() for t in (outputs if isinstance(outputs, tuple) else (outputs,))])


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    make, channels, kind = LAYERS[name]
    inputs = [randn(2, c, 6, 7).roll(i, 0) for i, (c,) in enumerate(channels)]
    call = lambda m, dtype: flat(m(*(x.to(dtype) for x in inputs)))  # noqa: E731
    assert_accelerated(randomize(make()), call, (kind,))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_layers(name):
    """Of inputs and parameters, those of taps that the mask hides put to 0: theirs are numbers that no output depends on."""
    make, channels, _ = LAYERS[name]
    found = {}
    for kind in ("exact", "own", "accelerated"):
        model = randomize(make()).eval()
        model = model.double() if kind == "exact" else model
        dtype = torch.float64 if kind == "exact" else torch.float32
        if kind == "accelerated":
            fastgen.accelerate(model)
        inputs = [randn(2, c, 6, 7).to(dtype).requires_grad_() for (c,) in channels]
        output = flat(model(*inputs))
        (output * torch.linspace(-1, 1, output.numel(), dtype=dtype)).sum().backward()
        for module in model.modules():
            if hasattr(module, "mask"):
                weight = (module.conv if hasattr(module, "conv") else module).weight
                hidden = ~module.mask.bool().expand_as(weight)
                assert kind != "accelerated" or not weight.grad[hidden].any()
                weight.grad[hidden] = 0
        found[kind] = [t.grad.double() for t in (*inputs, *model.parameters()) if t.grad is not None]
    for exact, own, ours in zip(*(found[kind] for kind in ("exact", "own", "accelerated")), strict=True):
        scale = max(
            exact.norm().item(), 1e-3 * max(t.norm().item() for t in found["exact"])
        )  # some are sums that cancel to 0
        assert (ours - exact).norm().item() <= 2 * (own - exact).norm().item() + WINOGRAD * scale


@torch.no_grad()
@pytest.mark.parametrize("make", [
    lambda: foreign.CausalConv2d(True, 4, 8, 3, padding=1),
    lambda: foreign.MaskedConv2d(4, 8, 3, padding=1, mask_type="B"),
    lambda: tutorial.VerticalStackConvolution(4, 8),
])  # fmt: skip
def test_weights_are_left_alone_and_changes_noticed(make):
    """Hidden taps keep what stands in them, and have no part in the output; a weight, or a mask, that changes is seen."""
    plain = randomize(make())
    model = fastgen.accelerate(copy.deepcopy(plain))
    x = randn(2, 4, 6, 7)
    conv, of_plain = (m.conv if hasattr(m, "conv") else m for m in (model, plain))
    before = conv.weight.clone()
    assert error(model(x), plain(x).double()) < 1e-6 and torch.equal(conv.weight, before)
    assert not torch.equal(of_plain.weight, before)  # theirs puts them to 0
    for c in (conv, of_plain):
        c.weight.data *= 3
    assert error(model(x), plain(x).double()) < 1e-6
    for m in (model, plain):
        m.mask[:, :, 0] = 0  # no mask of the op: their own code
    assert error(model(x), plain(x).double()) < 1e-6 and not torch.equal(conv.weight, before)


CAUSAL, MASKED = foreign.CausalConv2d, foreign.MaskedConv2d


@pytest.mark.parametrize("module, reason", [
    (lambda: CAUSAL(True, 4, 8, 3, stride=2, padding=1), "stride (2, 2)"),
    (lambda: CAUSAL(True, 4, 8, 3), "padding (0, 0) where (1, 1) keeps the size"),
    (lambda: CAUSAL(True, 4, 8, 3, padding=1, padding_mode="circular"), "padding_mode 'circular'"),
    (lambda: CAUSAL(True, 4, 8, (3, 4), padding=1), "an even kernel, 3x4"),
    (lambda: nn.utils.parametrizations.weight_norm(CAUSAL(True, 4, 8, 3, padding=1)), "its weight is parametrized"),
    (lambda: foreign.CheckerboardMaskedConv2d(4, 8, 3, padding=1), "its mask is none of A, B"),
    (lambda: MASKED(4, 8, 3, dilation=2, padding=1), "padding (1, 1) where (2, 2) keeps the size"),
    (lambda: tutorial.MaskedConvolution(4, 8, torch.eye(3)), "its mask is none of A, B, vertical_A"),
    (lambda: foreign.GatedActivation(F.relu), "activation relu"),
    (lambda: foreign.GatedActivation(nn.ELU()), "activation ELU"),
    (lambda: plus_plus.gated_resnet(4, F.elu), "a nonlinearity other than concat_elu"),
    (lambda: plus_plus.gated_resnet(4, lambda x: torch.cat([x, -x], 1)), "a nonlinearity other than concat_elu"),
    (lambda: foreign.Vector(16), "no convolutions: it takes an image for a vector"),
    (lambda: foreign.OwnLoop(), "sample overridden by OwnLoop"),
])  # fmt: skip
def test_what_is_left_alone_and_why(module, reason):
    module = fastgen.accelerate(module())
    assert mixin_of(module) is None
    (row,) = [row for row in fastgen.report(module).rows if row.name == ""]
    assert not row.accelerated and reason in row.detail


@torch.no_grad()
def test_hooks_see_what_they_saw():
    seen = []
    stacks = fastgen.accelerate(randomize(tutorial.GatedMaskedConv(8)))
    gate = fastgen.accelerate(foreign.GatedActivation(nn.Tanh()))
    for module in (stacks.conv_vert.conv, stacks.conv_horiz_1x1, gate._activation_fn):
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    stacks(randn(2, 8, 6, 7), randn(2, 8, 6, 7)), gate(randn(2, 8, 6, 7))
    assert [t.shape[1] for t in seen] == [16, 8, 4]


def levels(logits):
    """Of two colors with three levels each, as somebody's own function draws them."""
    return torch.multinomial(logits.unflatten(1, (2, 3)).flatten(0, 1).softmax(-1), 1).to(logits.dtype)


MODELS = {
    "coins": (lambda: foreign.Snail(), (3, 1, 5, 6)),
    "levels of two colors": (lambda: foreign.Snail(2, 6, levels), (3, 2, 5, 4)),
    "tutorial": (lambda: tutorial.PixelCNN(), (3, 1, 5, 6)),
    "tutorial, two colors": (lambda: tutorial.PixelCNN(2), (2, 2, 5, 4)),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model that has seen images, and one of which the lower rows, and a pixel of one image above them, are to be drawn."""
    make, shape = MODELS[name]
    model = randomize(make()).eval()
    image = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0))
    image = image if name.startswith("tutorial") else image.float()
    with torch.no_grad():
        model(image)
    image[:, :, 2:], image[0, :, 1, 2] = -1, -1
    return model, image


def drawn(model: nn.Module, image: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """Images from nothing and from ``image``, and what torch's generator gives next."""
    torch.manual_seed(seed)
    if isinstance(model, tutorial.PixelCNN):
        images = [model.sample(tuple(image.shape)), model.sample(image.shape, img=image.clone())]
    else:
        images = [model.sample(len(image)), model.sample(conditioned_on=image)]
    return [*images, torch.rand(3)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def every_warning():
    """A cause is told once in a process."""
    _dispatch.warn_once.cache_clear()


@pytest.fixture
def no_fallback():
    """A warning, which says that the model's own loop runs, is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*own loop runs")
        yield


@pytest.mark.parametrize("name", MODELS)
def test_the_same_pixels_under_the_same_seed(name, no_fallback):
    model, image = made(name)
    state, before = copy.deepcopy(model.state_dict()), drawn(model, image)
    assert not torch.equal(before[0], before[1]) and not same(before, drawn(model, image, seed=1))
    assert fastgen.accelerate(model) is model and mixin_of(model) is not None
    assert same(drawn(model, image), before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert mixin_of(other) is mixin_of(model) and same(drawn(other, image), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    (row,) = [row for row in fastgen.report(model).rows if row.name == ""]
    assert row.accelerated and row.detail.startswith("sample(): each pixel at the cost of a pixel")
    fastgen.restore(model)
    assert not any(mixin_of(m) for m in model.modules()) and same(drawn(model, image), before)


@pytest.mark.parametrize("name", ["coins", "tutorial"])
def test_weights_that_change_between_two_calls_are_noticed(name, no_fallback):
    model, image = made(name)
    plain = copy.deepcopy(model)
    fastgen.accelerate(model)
    before = drawn(model, image)
    changes = (
        lambda m: [p.data.mul_(-2) for p in m.parameters()],
        lambda m: m.load_state_dict(m.state_dict() | {key: 0.5 * p for key, p in m.named_parameters()}),
    )
    for change in changes:
        with torch.no_grad():
            change(model), change(plain)
        after = drawn(model, image)
        assert same(after, drawn(plain, image)) and not same(after, before)
        before = after


@pytest.mark.parametrize("name", ["coins", "tutorial"])
def test_a_pixel_takes_no_pass_of_the_model(name, no_fallback, monkeypatch):
    model, image = made(name)
    fastgen.accelerate(model)
    calls, forward = [], type(model).forward
    monkeypatch.setattr(model.parent_class, "forward", lambda *args: calls.append(0) or forward(*args))
    drawn(model, image)
    assert 0 < len(calls) < 6 < image[0, 0].numel()


class AutoregressiveModel(nn.Module):
    """Their base without ABC."""

    _sample_fn = staticmethod(foreign.coin)
    sample, _get_conditioned_on = (getattr(foreign.AutoregressiveModel, n) for n in ("sample", "_get_conditioned_on"))


class Plain(AutoregressiveModel):
    def __init__(self):
        super().__init__()
        self.conv = foreign.CausalConv2d(True, 1, 1, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


class Abstract(ABC, foreign.GatedActivation):
    pass


def test_classes_of_another_layout(no_fallback):
    """CPython lets an object change its class only where both begin in the same way."""
    model, image = randomize(Plain()), torch.full((2, 1, 4, 5), -1.0)
    torch.manual_seed(0)
    before = model.sample(conditioned_on=image)
    torch.manual_seed(0)
    assert torch.equal(fastgen.accelerate(model).sample(conditioned_on=image), before) and mixin_of(model) is not None
    (row,) = fastgen.report(fastgen.accelerate(Abstract())).rows
    assert not row.accelerated and row.detail == "its class derives from another than nn.Module first"


def test_the_function_that_draws_is_called_once_a_pixel(no_fallback):
    model, image = made("coins")
    calls = []
    model._sample_fn = lambda logits: calls.append(logits.clone()) or foreign.coin(logits)
    drawn(model, image)
    before, calls = calls, []
    drawn(fastgen.accelerate(model), image)
    assert len(calls) == len(before) == 60
    for own, ours in zip(before, calls, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


class Noise(nn.Module):
    """Dropout that is not torch's module."""

    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Pooled(nn.Module):
    def forward(self, x):
        return x + x.mean((2, 3), keepdim=True)


def under_a_hook(model):
    model._causal.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("between, change, reason", [
    (nn.Dropout(0.5), nn.Module.train, "in training mode it computes otherwise"),
    (Noise(), nn.Module.train, "in training mode it computes otherwise"),
    (nn.BatchNorm2d(8), nn.Module.train, "_between averages over the batch in training mode"),
    (Pooled(), nn.Module.eval, "_between"),
    (None, under_a_hook, "a hook on _causal looks at every call"),
    (None, nn.Module.bfloat16, "its weights are torch.bfloat16"),
])  # fmt: skip
def test_what_cannot_be_followed_is_drawn_by_their_own_loop(between, change, reason):
    model = randomize(foreign.Snail(between=between)).eval()
    change(model)
    dtype = model._input.weight.dtype
    image = torch.full((2, 1, 4, 5), -1, dtype=dtype)
    plain = copy.deepcopy(model)
    fastgen.accelerate(model, exclude="?*")  # only what samples: the layers round otherwise
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"Snail.sample: .*{reason}.*own loop runs"):
        ours = [model.sample(conditioned_on=image), torch.rand(3)]
    torch.manual_seed(0)
    assert same(ours, [plain.sample(conditioned_on=image), torch.rand(3)])
    assert same(list(model.state_dict().values()), list(plain.state_dict().values()))


def test_training_mode_without_noise_is_followed(no_fallback):
    model, image = made("coins")
    before = drawn(model.train(), image)
    assert same(drawn(fastgen.accelerate(model), image), before) and model.training


def test_the_model_learns_no_shape_from_sampling(no_fallback):
    """Its first call tells it the shape of its images; that of the plan is none."""
    model = fastgen.accelerate(randomize(foreign.Snail()))
    model.sample(conditioned_on=torch.full((2, 1, 4, 5), -1.0))
    assert not hasattr(model, "_c") and not list(model.buffers(recurse=False))
    with pytest.raises(AttributeError, match="_c"):
        model.sample(2)  # as theirs


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_of_old_is_no_hook_that_looks(no_fallback):
    model, image = made("coins")
    nn.utils.weight_norm(model._output)
    before = drawn(model, image)
    assert same(drawn(fastgen.accelerate(model), image), before)


def test_a_part_of_an_image_is_theirs():
    model, _ = made("tutorial")
    model, part = fastgen.accelerate(model), torch.full((3, 1, 5, 6), -1)
    returned = model.sample((3, 1, 2, 6), part)
    assert returned is part and (part[:, :, :2] >= 0).all() and (part[:, :, 2:] == -1).all()


def test_an_image_that_is_given_is_written_to(no_fallback):
    model, image = made("tutorial")
    kept = image.clone()
    assert fastgen.accelerate(model).sample(image.shape, image) is image
    assert (image >= 0).all() and torch.equal(image[1:, :, :1], kept[1:, :, :1])


@torch.no_grad()
def test_plus_plus_takes_batches_of_any_size():
    model = randomize(plus_plus.PixelCNN()).eval()
    x = randn(4, 3, 6, 7).tanh()
    before = model(x)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        model(x[:1])
    kept = model.init_padding
    fastgen.accelerate(model)
    assert "batches of any size" in next(row.detail for row in fastgen.report(model).rows if row.name == "")
    assert error(model(x), before.double()) < WINOGRAD and torch.equal(model(x), model(x, sample=True))
    assert error(model(x[:1]), before[:1].double()) < WINOGRAD and model(x[:, :, :3]).shape == (4, 20, 3, 7)
    assert model.init_padding is kept
    fastgen.restore(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("colors", [1, 3])
def test_plus_plus_is_sampled(colors):
    model = fastgen.accelerate(randomize(plus_plus.PixelCNN(input_channels=colors)))
    call = {"seeds": [3, 4], "distribution": "logistic_mixture", "levels": 256}
    images = sample(model, (2, colors, 4, 6), method="cached", **call)
    steps = (images + 1) * 127.5
    assert (images.abs() <= 1).all() and (steps - steps.round()).abs().max() < 1e-3 and model.init_padding is None
    torch.testing.assert_close(images, sample(model, (2, colors, 4, 6), method="naive", **call), rtol=0, atol=1e-5)
