"""Stand-ins for the blocks of guided-diffusion and latent-diffusion, as `foreign` writes them, in every mode that these have."""

import pytest
import torch
from torch import nn

import fastgen
from fastgen.integrations.stand_in import mixin_of

from ..modules import randomize
from . import foreign
from .numerics import assert_accelerated


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("out_channels", [16, 32])
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_res_block(scale_shift, up, out_channels):
    block = randomize(foreign.ResBlock(16, 24, out_channels, 0.5, scale_shift, up))
    x, emb = randn(2, 16, 9, 8), randn(2, 24)
    assert_accelerated(
        block, lambda m, dtype: m(x.to(dtype), emb.to(dtype)), ("ResBlock", "Conv2d", "GroupNorm32", "Sequential")
    )


@pytest.mark.parametrize("kind", [foreign.QKVAttention, foreign.QKVAttentionLegacy])
def test_attention_of_guided_diffusion(kind):
    qkv = randn(2, 3 * 2 * 16, 33)
    assert_accelerated(kind(2), lambda m, dtype: m(qkv.to(dtype)), (kind.__name__,))


@pytest.mark.parametrize("with_embedding", [False, True])
@pytest.mark.parametrize("channels", [(16, 16, False), (16, 32, False), (16, 32, True)])
def test_resnet_block(channels, with_embedding):
    c, out, shortcut = channels
    block = randomize(foreign.ResnetBlock(c, out, 24, 0.5, shortcut))
    x, temb = randn(2, c, 8, 10), randn(2, 24) if with_embedding else None
    call = lambda m, dtype: m(x.to(dtype), None if temb is None else temb.to(dtype))  # noqa: E731
    assert_accelerated(block, call, ("ResnetBlock", "Conv2d", "GroupNorm"))


def test_attn_block():
    x = randn(2, 16, 6, 7)
    assert_accelerated(
        randomize(foreign.AttnBlock(16)), lambda m, dtype: m(x.to(dtype)), ("AttnBlock", "GroupNorm", "Conv2d")
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_context", [False, True])
def test_cross_attention(with_context, masked):
    attention = randomize(foreign.CrossAttention(16, 12 if with_context else 16))
    x, context = randn(2, 33, 16), randn(2, 7, 12) if with_context else None
    mask = torch.rand(2, 7 if with_context else 33) > 0.5 if masked else None
    mask = (
        None if mask is None else torch.cat([torch.zeros_like(mask[:1]), mask[1:]])
    )  # a row that sees nothing: its mean
    call = lambda m, dtype: m(x.to(dtype), None if context is None else context.to(dtype), mask)  # noqa: E731
    assert_accelerated(attention, call, ("CrossAttention",))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attend(scale):
    q, k, v = randn(2, 3, 33, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8).flip(0)
    call = lambda m, dtype: m(q.to(dtype), k.to(dtype), v.to(dtype))  # noqa: E731
    assert_accelerated(foreign.Attend(0.5, scale), call, ("Attend",))


@pytest.mark.parametrize("modulated", [False, True])
def test_block(modulated):
    x = randn(2, 12, 6, 7)
    of = tuple(randn(2, 16, 1, 1).flip(i) for i in range(2)) if modulated else None
    call = lambda m, dtype: m(x.to(dtype), None if of is None else tuple(t.to(dtype) for t in of))  # noqa: E731
    assert_accelerated(randomize(foreign.Block(12, 16, 0.5)), call, ("Block", "RMSNorm", "Conv2d"))


def test_linear_attention():
    x = randn(2, 12, 6, 7)
    call = lambda m, dtype: m(x.to(dtype))  # noqa: E731
    assert_accelerated(randomize(foreign.LinearAttention(12)), call, ("LinearAttention", "Conv2d", "RMSNorm"))


def test_geglu():
    x = randn(2, 33, 16)
    assert_accelerated(randomize(foreign.GEGLU(16, 24)), lambda m, dtype: m(x.to(dtype)), ("GEGLU",))


@pytest.mark.parametrize("options", [{"use_conv": True}, {"with_conv": True}])
def test_upsample(options):
    x = randn(2, 16, 7, 8)
    assert_accelerated(
        randomize(foreign.Upsample(16, **options)), lambda m, dtype: m(x.to(dtype)), ("Upsample", "Conv2d")
    )


@pytest.mark.parametrize("options", [{"use_conv": False}, {"with_conv": False}, {"use_conv": True, "dims": 1}])
def test_upsampling_without_a_convolution_of_images_is_left_alone(options):
    upsample = fastgen.accelerate(foreign.Upsample(16, **options))
    assert mixin_of(upsample) is None
    rows = [row.detail for row in fastgen.report(upsample).rows if row.name == ""]
    assert rows == (["1 dimensions"] if "dims" in options else [])


@pytest.mark.parametrize("layers", [
    (nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 8, 3, padding=1)),
    (nn.GroupNorm(4, 16), nn.SiLU(), nn.Dropout(0.5), nn.Conv2d(16, 8, 3, padding=1), nn.Identity()),
    (nn.Conv2d(16, 16, 1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Flatten()),
    (nn.GroupNorm(4, 16), nn.GELU(), nn.Conv2d(16, 8, 3, padding=1)),
    (nn.GroupNorm(4, 16), nn.SiLU(), nn.GroupNorm(4, 16), nn.SiLU()),
    (nn.GroupNorm(4, 16), nn.Dropout(0.5)),
    (nn.SiLU(), nn.GroupNorm(4, 16)),
    (nn.GroupNorm(4, 16), nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(16, 8, 3, padding=1)),
    (nn.GroupNorm(4, 16), nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(16, 8, 3)),
    (nn.GroupNorm(4, 16), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(16, 8, 3, padding=1)),
    (nn.GroupNorm(4, 16), nn.Upsample(scale_factor=3), nn.Conv2d(16, 8, 3, padding=1)),
])  # fmt: skip
def test_sequential(layers):
    x = randn(2, 16, 8, 9)
    model = randomize(nn.Sequential(*layers))
    assert_accelerated(model, lambda m, dtype: m(x.to(dtype)), ("Sequential", "GroupNorm"))


class Mine(foreign.ResBlock):
    def _forward(self, x, emb):
        return x


@pytest.mark.parametrize("spoil, reason", [
    (lambda b: b.in_layers.insert(1, nn.Identity()), "layers in another order"),
    (lambda b: setattr(b, "forward", lambda x, emb: x), "forward overridden on the module"),
    (lambda b: delattr(b, "emb_layers"), "no emb_layers"),
    (lambda b: b.to("meta"), "meta device"),
    (lambda b: setattr(b, "__class__", Mine), "overridden by Mine"),
])  # fmt: skip
def test_what_is_left_alone_and_why(spoil, reason):
    block = foreign.ResBlock(16, 24)
    spoil(block)
    fastgen.accelerate(block)
    assert mixin_of(block) is None
    (row,) = [row for row in fastgen.report(block).rows if row.name == ""]
    assert not row.accelerated and reason in row.detail


def test_in_one_dimension_only_the_norms_are_ours():
    block = randomize(foreign.ResBlock(16, 24, dims=1))
    x, emb = randn(2, 16, 9), randn(2, 24)
    assert_accelerated(block, lambda m, dtype: m(x.to(dtype), emb.to(dtype)), ("GroupNorm32",))
    fastgen.accelerate(block)
    assert mixin_of(block) is None


class AnotherAttention(nn.Module):
    """Of the name of diffusers' class, and of nothing else that it has."""

    def forward(self, x):
        return x


AnotherAttention.__name__ = "Attention"


def test_a_class_that_shares_its_name_alone_is_no_matter_for_the_report():
    assert fastgen.report(nn.ModuleList([AnotherAttention()])).rows == ()
