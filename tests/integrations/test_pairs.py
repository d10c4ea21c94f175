"""Images that a block on the way up reads where they lie, and the moments that a convolution leaves for the norm after it."""

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen import _library
from fastgen.integrations import diffusers as stand_ins
from fastgen.integrations import guided_diffusion, pair
from fastgen.integrations.pair import Pair
from fastgen.integrations.stand_in import mixin_of
from fastgen.ops import _moments

from ..backends import import_peer
from ..modules import randomize
from . import foreign, foreign_unet
from .numerics import WINOGRAD, assert_accelerated, error
from .test_diffusers import LoRA

STEPS = torch.tensor([3, 500])
needs_kernels = pytest.mark.skipif(_library.ISA is None, reason="no kernels")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + seed))
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


# A pair is as good as the tensor that it stands for.


@pytest.mark.parametrize(
    "use",
    [
        lambda x: torch.sum(x, 1), lambda x: F.conv2d(x, torch.ones(2, 7, 1, 1)), lambda x: torch.cat([x, x], 1),
        lambda x: x.mean((2, 3)), lambda x: x + 1, lambda x: 1 - x, lambda x: 2 * x / 3, lambda x: x[:, 1:4],
        lambda x: torch.ones(2, 7, 4, 4) * x, lambda x: -x**2, lambda x: nn.Conv2d(7, 1, 1, bias=False).double()(x.double()) * 0,
        lambda x: torch.tensor([*x.shape, x.dim(), len(x)]),
    ],
)  # fmt: skip
def test_what_is_done_to_a_pair_is_done_to_the_image_of_both(use):
    a, b = randn(2, 3, 4, 4), randn(2, 4, 4, 4, seed=1)
    assert torch.equal(use(Pair(a, b)), use(torch.cat([a, b], 1)))


def test_in_place():
    pair = Pair(randn(2, 3, 4, 4), randn(2, 4, 4, 4))
    pair.mul_(0)
    pair[:, 1] = 2
    assert pair.sum() == 2 * 2 * 16


def make(tensors, **options):
    return torch.cat(tensors, **options)


@pytest.mark.parametrize(
    ("tensors", "options"),
    [
        ([(2, 3, 4, 4), (2, 4, 4, 4)], {"dim": 0}), ([(2, 3, 4, 4)] * 2, {}), ([(2, 3, 4, 4)] * 3, {"dim": 1}),
        ([(2, 3, 4), (2, 4, 4)], {"dim": 1}), ([(2, 3, 4, 4), (2, 3, 4, 5)], {"dim": 1}), ([(2, 3, 4, 4), (0,)], {"dim": 1}),
        ([(2, 3, 4, 4), (2, 3, 4, 4)], {"dim": -3}),
    ],
)  # fmt: skip
def test_other_calls_of_cat_are_torchs(tensors, options):
    tensors, outcomes = [randn(*shape) for shape in tensors], []
    for function in (make, pair.with_pairs(make)):
        try:
            outcomes.append(function(tensors, **options))
        except RuntimeError as error:
            outcomes.append(error)
    theirs, ours = outcomes
    assert type(ours) is type(theirs)
    assert str(ours) == str(theirs) if isinstance(theirs, RuntimeError) else torch.equal(ours, theirs)


def test_what_makes_pairs():
    assert type(pair.with_pairs(make)([randn(2, 3, 4, 4)] * 2, dim=1)) is Pair
    assert pair.cats(make) and not pair.cats(randn) and not pair.cats(torch.no_grad()(make)) and not pair.cats(len)


# Models.


@pytest.fixture
def read(monkeypatch):
    """Of each pair that a block was given, whether it was read where it lay."""
    found: list[bool] = []

    def parted(input, norm, shortcut):
        parts = pair.parted(input, norm, shortcut)
        found.extend([parts[1] is not None] * (type(input) is Pair))
        return parts

    for module in (stand_ins, guided_diffusion):
        monkeypatch.setattr(module, "parted", parted)
    return found


SMALL = {"sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
UP = {
    "UpBlock2D": {},
    "AttnUpBlock2D": {"attention_head_dim": 8},
    "CrossAttnUpBlock2D": {},
    "SimpleCrossAttnUpBlock2D": {},
    "ResnetUpsampleBlock2D": {},
    "SkipUpBlock2D": {"block_out_channels": (32, 64)},
    "AttnSkipUpBlock2D": {"block_out_channels": (32, 64), "attention_head_dim": 8},
}


def unet(up: str = "AttnUpBlock2D", **options):
    diffusers = import_peer("diffusers")
    crossed, skips = "Cross" in up, "Skip" in up
    kind = diffusers.UNet2DConditionModel if crossed else diffusers.UNet2DModel
    down = ("SkipDownBlock2D",) * 2 if skips else ("DownBlock2D",) * 2
    config = {"cross_attention_dim": 24, "attention_head_dim": 4} if crossed else {}
    if up == "SimpleCrossAttnUpBlock2D":
        config["mid_block_type"] = "UNetMidBlock2DSimpleCrossAttn"
    last = "SkipUpBlock2D" if skips else "UpBlock2D"
    return randomize(
        kind(**SMALL | UP[up] | config | options, down_block_types=down, up_block_types=(up, last))
    ).to(memory_format=torch.channels_last).eval()  # fmt: skip


def assert_same(expected, gradients):
    largest = max(grad.abs().max().item() for grad in expected)  # some are 0, but for rounding
    for theirs, ours in zip(expected, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


def arguments(model, dtype=torch.float32):
    of_cross = (randn(2, 7, 24).to(dtype),) if type(model).__name__ == "UNet2DConditionModel" else ()
    return randn(2, model.config.in_channels, 16, 16).to(dtype), STEPS, *of_cross


def call(model, dtype=torch.float32):
    return model(*arguments(model, dtype)).sample


@needs_kernels
@pytest.mark.parametrize("up", UP)
def test_stages_of_diffusers(up, read):
    """Float32 and channels-last, where every shortcut reads both, but for what FIR filters hand over channel by channel."""
    model = unet(up)
    assert_accelerated(model, call, (up, "ResnetBlock2D"))
    assert read.count(True) == (3 if "Skip" in up else 4)
    assert len(read) == 8  # accelerated, and exactly, where convolutions are torch's
    (row, *_) = [row for row in fastgen.report(fastgen.accelerate(model)).rows if row.kind == up]
    assert row.accelerated and "skips" in row.detail


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_dtypes(dtype, layout, read):
    model = unet()
    exact = call(copy.deepcopy(model).double(), torch.float64)
    model = model.to(dtype, memory_format=layout)
    args = [a.contiguous(memory_format=layout) if a.dim() == 4 else a for a in arguments(model, dtype)]
    own = error(model(*args).sample, exact)
    ours = fastgen.accelerate(model)(*args).sample
    assert error(ours, exact) <= 2 * own + WINOGRAD and len(read) == 4


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("factors", [(0.9, 0.2, 1.2, 1.4), (1.1, 1.1, 0.5, 0.5)])
def test_free_u(factors, read):
    """Which changes in place what the block before gave, and the skips; then without it again."""
    model = unet("CrossAttnUpBlock2D")
    before = call(model)
    model.enable_freeu(*factors)
    expected = call(model)
    fastgen.accelerate(model)
    assert error(call(model), expected.double()) < WINOGRAD < 1e-3 < error(expected, before.double())
    assert read == [True] * 4
    model.disable_freeu()
    assert error(call(model), before.double()) < WINOGRAD


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("at", ["", ".conv_shortcut", ".norm1", ".nonlinearity"])
def test_hooks_see_what_they_saw(at, read):
    model, seen = unet(), []
    model.get_submodule("up_blocks.0.resnets.0" + at).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    expected = call(model)
    fastgen.accelerate(model)
    assert error(call(model), expected.double()) < WINOGRAD
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for theirs, ours in zip(first, second, strict=True):
        assert type(ours) is torch.Tensor and error(ours, theirs.double()) < WINOGRAD
    assert read.count(True) == {"": 2}.get(at, 3)


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("layer", ["conv1", "conv_shortcut"])
def test_an_adapter_in_the_place_of_a_convolution(layer, read):
    plain = unet()
    models = plain, fastgen.accelerate(copy.deepcopy(plain))
    for model in models:
        block = model.up_blocks[1].resnets[1]
        setattr(block, layer, LoRA(getattr(block, layer), 1))
    theirs, ours = (call(model) for model in models)
    assert error(ours, theirs.double()) < WINOGRAD and read.count(True) == 3


@needs_kernels
@torch.no_grad()
def test_a_block_that_is_left_alone_gets_one_image(read):
    model = unet()
    expected = call(model)
    fastgen.accelerate(model, exclude="up_blocks.0.resnets.1")
    assert error(call(model), expected.double()) < WINOGRAD and read == [True] * 2  # of the other stage


@needs_kernels
def test_gradients_checkpoints_and_autocast(read):
    model = unet().train()
    plain = copy.deepcopy(model)
    fastgen.accelerate(model).enable_gradient_checkpointing()
    grads = [torch.autograd.grad(call(m).square().mean(), list(m.parameters())) for m in (plain, model)]
    assert_same(*grads)
    assert not read
    with torch.no_grad():
        expected = call(plain)
        assert error(call(model), expected.double()) < WINOGRAD and read == [True] * 4
        with torch.autocast("cpu", torch.bfloat16):
            theirs, ours = call(plain), call(model)
        assert ours.dtype == theirs.dtype and error(ours, expected.double()) <= 2 * error(theirs, expected.double())
        assert read == [True] * 4 + [False] * 4


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied, read):
    model = unet()
    expected = call(model)
    other = copied(fastgen.accelerate(model))
    assert torch.equal(call(other), call(model)) and read == [True] * 8
    assert torch.equal(call(fastgen.restore(other)), expected) and type(other.up_blocks[0]) is type(unet().up_blocks[0])


@torch.no_grad()
def test_under_the_compiler(read):
    model = fastgen.accelerate(unet("UpBlock2D"))
    x, skips, emb = randn(2, 32, 8, 8), (randn(2, 16, 8, 8), randn(2, 32, 8, 8, seed=1)), randn(2, 64)
    stage = model.up_blocks[0]
    assert mixin_of(stage) is stand_ins.UpBlock2D
    expected = stage(x, skips, emb)
    del read[:]
    assert error(torch.compile(stage, backend="aot_eager", fullgraph=True)(x, skips, emb), expected.double()) < WINOGRAD
    assert not read


# guided-diffusion.


def of_guided(model, dtype=torch.float32):
    return model(randn(2, 3, 16, 16).to(dtype), STEPS)


@needs_kernels
@pytest.mark.parametrize("block", [foreign.ResBlock, foreign_unet.ResBlock])
@pytest.mark.parametrize("ckpt", [False, True])
def test_the_u_net_of_guided_diffusion(ckpt, block, read):
    model = randomize(foreign_unet.UNetModel(ckpt=ckpt, block=block)).to(memory_format=torch.channels_last)
    assert_accelerated(model, of_guided, ("UNetModel", "ResBlock"))
    assert read.count(True) == 4 and len(read) == 8
    plain = copy.deepcopy(model)
    grads = [
        torch.autograd.grad(of_guided(m).square().mean(), list(m.parameters()))
        for m in (plain, fastgen.accelerate(model))
    ]
    assert_same(*grads)
    assert len(read) == 8


@needs_kernels
@torch.no_grad()
def test_a_hook_on_a_stage_of_guided_diffusion(read):
    model, seen = randomize(foreign_unet.UNetModel()).eval(), []
    model.output_blocks[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    expected = of_guided(model)
    assert error(of_guided(fastgen.accelerate(model)), expected.double()) < WINOGRAD
    assert type(seen[1]) is torch.Tensor and error(seen[1], seen[0].double()) < WINOGRAD and not read


def test_a_forward_of_another_is_left_alone():
    rows = fastgen.report(fastgen.accelerate(foreign_unet.SuperResModel())).rows
    assert [row.detail for row in rows if row.kind == "SuperResModel"] == ["forward overridden by SuperResModel"]


# Moments.


@pytest.fixture
def moments(monkeypatch):
    """Of each norm whose scale and shift were asked for, whether moments were known."""
    module, found = sys.modules["fastgen.ops.group_norm_affine"], []

    def noting(function, known):
        def call(*args):
            found.append(known)
            return function(*args)

        return call

    for kind in ("packed", "direct"):  # of small images too
        monkeypatch.setitem(_moments.LEAST_BYTES, kind, 0)
    monkeypatch.setattr(module, "_known", noting(module._known, True))
    monkeypatch.setattr(module, "_forward", noting(module._forward, False))
    return found


class Row(nn.Module):
    """Two residual blocks of diffusers, wide enough for Winograd's algorithms, and something between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        block = import_peer("diffusers.models.resnet").ResnetBlock2D
        self.first, self.second = (block(in_channels=64, temb_channels=None, groups=8) for _ in range(2))
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x, None)), None)


class Does(nn.Module):
    """A foreign module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def half(x):
    x[:, ::2] *= 3.0
    return x


def images() -> torch.Tensor:
    return randn(2, 64, 16, 16)


@needs_kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_moments_of_the_convolution_before(mode, moments):
    model = randomize(Row(nn.Identity())).eval()
    with mode():
        expected = model(images())
        assert error(fastgen.accelerate(model)(images()), expected.double()) < WINOGRAD
    assert moments == [False, True, True, True]


@needs_kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "function", [half, lambda x: x.mul_(2), lambda x: x + 1, lambda x: F.relu(x, inplace=True), torch.clone]
)
@pytest.mark.parametrize("by", ["module", "hook"])
def test_moments_are_not_those_of_what_has_changed_since(by, function, mode, moments):
    model = randomize(Row(Does(function) if by == "module" else nn.Identity())).eval()
    if by == "hook":
        model.first.register_forward_hook(lambda module, args, output: function(output))
    with mode():
        expected = model(images())
        assert error(fastgen.accelerate(model)(images()), expected.double()) < WINOGRAD
    assert moments == [False, True, False, True]


@needs_kernels
@torch.no_grad()
def test_moments_of_a_whole_u_net(moments):
    """Of the skips too, which lie long before they are read."""
    model = unet("CrossAttnUpBlock2D", block_out_channels=(64, 128))
    expected = call(model)
    assert error(call(fastgen.accelerate(model)), expected.double()) < WINOGRAD
    assert moments.count(True) > moments.count(False) > 0
    before = list(moments)
    model.enable_freeu(0.9, 0.2, 1.2, 1.4)
    del moments[:]
    plain = fastgen.restore(copy.deepcopy(model))
    assert error(call(model), call(plain).double()) < WINOGRAD
    assert moments.count(True) < before.count(True)  # of a stage that FreeU has its hands in, fewer


def test_moments_leave_copies_and_gradients_alone(moments):
    model = fastgen.accelerate(randomize(Row(nn.Identity())))
    model(images()).sum().backward()
    assert not any(moments) and pickle.loads(pickle.dumps(model)) is not None
