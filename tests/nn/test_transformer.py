"""`SpatialTransformer` and its parts against diffusers', whose state dicts they have, and against plain torch."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastgen.nn import (
    BasicTransformerBlock,
    Conv2d,
    CrossAttention,
    FeedForward,
    LayerNorm,
    PlainGroupNorm,
    SpatialTransformer,
)

from ..backends import import_peer, requires_cpu
from ..modules import max_difference, randomize
from .test_attention import Copies

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def _build(norm=None, dtype=torch.float32, **options):
    given = {"num_heads": 2, "context_dim": 10, "num_groups": 4, "depth": 2, **options}
    given |= {} if norm is None else {"norm": norm}
    return randomize(SpatialTransformer(24, **given)).to(dtype)


def _inputs(dtype=torch.float32, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 24, 4, 5, generator=generator, dtype=dtype).contiguous(memory_format=layout)
    return x, torch.randn(2, 7, 10, generator=generator, dtype=dtype)


@pytest.mark.parametrize("context_dim", [None, 10])
def test_a_block_is_that_of_diffusers(context_dim):
    attention = import_peer("diffusers.models.attention")
    block = randomize(BasicTransformerBlock(24, context_dim, num_heads=3)).eval()
    of_context = {"cross_attention_dim": context_dim, "double_self_attention": context_dim is None}
    peer = attention.BasicTransformerBlock(24, 3, 8, **of_context).eval()
    peer.load_state_dict(block.state_dict())
    x, context = torch.randn(2, 5, 24), None if context_dim is None else torch.randn(2, 7, context_dim)
    for ours in (block(x, context), torch.no_grad()(block)(x, context)):
        assert max_difference(ours, peer(x, encoder_hidden_states=context)) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*Transformer2DModelOutput:FutureWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use_linear", [False, True])
def test_is_transformer_2d_of_diffusers(use_linear, layout):
    transformer = import_peer("diffusers.models.transformers.transformer_2d")
    ours = _build(use_linear=use_linear).eval()
    peer = transformer.Transformer2DModel(
        2, 12, in_channels=24, num_layers=2, norm_num_groups=4, cross_attention_dim=10, use_linear_projection=use_linear
    ).eval()
    peer.load_state_dict(ours.state_dict())
    x, context = _inputs(layout=layout)
    expected = peer(x, encoder_hidden_states=context).sample
    assert (expected - x).std() > 0.1
    assert max_difference(ours(x, context), expected) <= 1e-5
    with torch.no_grad():
        assert max_difference(ours(x, context), expected) <= 1e-5


@pytest.mark.parametrize("use_linear", [False, True])
@pytest.mark.parametrize("context_dim", [None, 10])
def test_gradients_and_layout_are_those_of_plain_torch(context_dim, use_linear):
    options = {"dtype": torch.float64, "context_dim": context_dim, "use_linear": use_linear}
    plain = _build(PlainGroupNorm, **options)
    assert not any(isinstance(module, Conv2d | LayerNorm) for module in plain.modules())
    x, context = _inputs(torch.float64)
    given = [] if context_dim is None else [context.requires_grad_()]
    expected = torch.autograd.grad(plain(x.requires_grad_(), *given).square().sum(), [x, *given, *plain.parameters()])
    for layout in LAYOUTS:
        fused = _build(**options)
        image = x.detach().contiguous(memory_format=layout).requires_grad_()
        y = fused(image, *given)
        assert y.is_contiguous(memory_format=layout)
        result = torch.autograd.grad(y.square().sum(), [image, *given, *fused.parameters()])
        for ours, theirs in zip(result, expected, strict=True):
            assert max_difference(ours, theirs) <= 1e-10 * max(1, theirs.abs().max().item())


def test_convolutions_and_linear_layers_compute_the_same():
    conv, linear = _build(dtype=torch.float64), _build(dtype=torch.float64, use_linear=True)
    state = conv.state_dict()
    linear.load_state_dict(state | {k: v.flatten(1) for k, v in state.items() if v.dim() == 4})
    for layout in LAYOUTS:
        x, context = _inputs(torch.float64, layout)
        assert max_difference(conv(x, context), linear(x, context)) <= 1e-12


@requires_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use_linear", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_on_the_way(dtype, use_linear, layout):
    block = _build(dtype=dtype, use_linear=use_linear).eval()
    x, context = _inputs(dtype, layout)
    with torch.no_grad():
        block(x, context)  # weights are packed at the first call
        with Copies() as copies:
            y = block(x, context)
    assert copies.names == []
    assert y.is_contiguous(memory_format=layout)


def test_a_channels_last_image_is_not_turned(monkeypatch):
    block = _build()
    x, context = _inputs()
    expected = block(x, context)
    monkeypatch.setattr(torch, "baddbmm", None)
    assert max_difference(block(x.to(memory_format=torch.channels_last), context), expected) <= 1e-5
    with pytest.raises(TypeError):
        block(x, context)


@pytest.mark.parametrize("use_linear", [False, True])
def test_hooks_and_stand_ins_of_its_layers_are_called(use_linear):
    seen = []
    for layout in LAYOUTS:
        block = _build(use_linear=use_linear).eval()
        x, context = _inputs(layout=layout)
        expected = block(x, context)
        for layer in (block.proj_in, block.proj_out):
            layer.register_forward_hook(lambda *_: seen.append("hook"))
        assert max_difference(block(x, context), expected) <= 1e-5 and seen == ["hook"] * 2
        seen.clear()
        block.proj_in, block.proj_out = nn.Sequential(block.proj_in), nn.Sequential(block.proj_out)
        block.transformer_blocks[0].norm2 = nn.Sequential(block.transformer_blocks[0].norm2)
        assert max_difference(block(x, context), expected) <= 1e-5
        seen.clear()


def test_starts_as_identity_pickles_copies_prints():
    x, context = _inputs()
    block = SpatialTransformer(24, num_head_channels=12, num_groups=4, context_dim=10)
    assert torch.equal(block(x, context), x)
    randomize(block)
    for twin in (pickle.loads(pickle.dumps(block)), copy.deepcopy(block)):
        assert torch.equal(twin(x, context), block(x, context))
    for part in ("24, use_linear=False", "num_heads=2", "GEGLU(", "LayerNorm("):
        assert part in repr(block)


def test_dropout_is_of_training_alone():
    for module in (CrossAttention(24, num_heads=2, dropout=0.5), FeedForward(24, dropout=0.5)):
        randomize(module)
        x = torch.randn(2, 5, 24)
        assert max_difference(module(x), module(x)) > 1e-3
        assert torch.equal(module.eval()(x), module(x))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"SpatialTransformer: num_heads must divide channels, got num_heads=5 and"):
        SpatialTransformer(24, num_heads=5, num_groups=4)
    with pytest.raises(ValueError, match=r"SpatialTransformer: num_head_channels must divide channels, got num_head_"):
        SpatialTransformer(24, num_head_channels=7, num_groups=4)
    with pytest.raises(ValueError, match=r"CrossAttention: num_heads must divide channels, got num_heads=5"):
        CrossAttention(24, num_heads=5)
