"""Stand-ins for the transformers of latent-diffusion, stable-diffusion 2 and sgm, as `foreign_compvis` writes them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.integrations import fusing
from fastgen.integrations.stand_in import mixin_of

from ..modules import randomize
from . import foreign_compvis as foreign
from .numerics import WINOGRAD, assert_accelerated, error


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


TOKENS, IMAGE, CONTEXT = randn(2, 33, 16), randn(2, 12, 6, 7), randn(2, 7, 10)
ATTENTION = ("CrossAttention", "GEGLU", "BasicTransformerBlock")
WHOLE = (*ATTENTION, "SpatialTransformer", "GroupNorm")
BLOCKS = {
    "1": lambda **o: foreign.BasicTransformerBlock(16, 10, **o),
    "2, context first": lambda **o: foreign.BasicTransformerBlock(16, 10, version=2, disable_self_attn=True, **o),
    "3": lambda **o: foreign.BlockOfTokens(16, 10, **o),
    "3, context first": lambda **o: foreign.BlockOfTokens(16, 10, disable_self_attn=True, **o),
    "3, one layer": lambda **o: foreign.BasicTransformerSingleLayerBlock(16, 10, **o),
}
TRANSFORMERS = {
    "1": lambda **o: foreign.SpatialTransformer(12, 2, 10, **o),
    "2": lambda **o: foreign.SpatialTransformerOfLists(12, 2, 10, **o),
    "2, linear": lambda **o: foreign.SpatialTransformerOfLists(12, 2, 10, use_linear=True, **o),
    "3": lambda **o: foreign.SpatialTransformerOfLists(12, 2, 10, version=3, **o),
    "3, linear": lambda **o: foreign.SpatialTransformerOfLists(12, 2, 10, version=3, use_linear=True, **o),
}


def context_of(name: str, dtype: torch.dtype = torch.float32):
    context = CONTEXT.to(dtype)
    return [context, context.flip(0)] if name.startswith("2") else context


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, checkpoint):
    block = randomize(BLOCKS[name](ckpt=checkpoint))
    call = lambda m, dtype: m(TOKENS.to(dtype), context=CONTEXT.to(dtype))  # noqa: E731
    assert_accelerated(block, call, ("CrossAttention", "GEGLU", type(block).__name__))


def test_a_block_of_tokens_alone_and_one_without_a_gate():
    for options in ({}, {"glu": False}):
        block = randomize(foreign.BasicTransformerBlock(16, **options))
        assert_accelerated(block, lambda m, dtype: m(TOKENS.to(dtype)), ("CrossAttention", "BasicTransformerBlock"))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name, layout):
    model, x = randomize(TRANSFORMERS[name]()), IMAGE.contiguous(memory_format=layout)
    assert_accelerated(model, lambda m, dtype: m(x.to(dtype), context=context_of(name, dtype)), WHOLE)
    with torch.no_grad():
        y = fastgen.accelerate(model)(x, context_of(name))
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("make", [foreign.SpatialSelfAttention, foreign.MemoryEfficientAttnBlock])
def test_attention_of_images(make):
    assert_accelerated(randomize(make(12)), lambda m, dtype: m(IMAGE.to(dtype)), (make.__name__, "GroupNorm"))


@pytest.mark.parametrize("with_context", [False, True])
def test_memory_efficient_attention(with_context):
    attention = randomize(foreign.MemoryEfficientCrossAttention(16, 10 if with_context else 16))
    context = CONTEXT if with_context else None
    call = lambda m, dtype: m(TOKENS.to(dtype), None if context is None else context.to(dtype))  # noqa: E731
    assert_accelerated(attention, call, ("MemoryEfficientCrossAttention",))
    fastgen.accelerate(attention)
    with pytest.raises(NotImplementedError):
        attention(TOKENS, context, torch.ones(2, 7))


@torch.no_grad()
@pytest.mark.parametrize("module, x", [
    (foreign.MemoryEfficientCrossAttention(16, 16), TOKENS), (foreign.MemoryEfficientAttnBlock(12), IMAGE),
])  # fmt: skip
def test_an_operator_of_xformers_that_was_chosen_is_called(module, x):
    module, called = fastgen.accelerate(randomize(module)), []
    module.attention_op = lambda *args: called.append(args) or args[-1]
    module(x)
    assert len(called) == 1


@torch.no_grad()
@pytest.mark.parametrize("options", [
    {"additional_tokens": randn(2, 3, 16)}, {"additional_tokens": randn(2, 3, 16), "n_times_crossframe_attn_in_self": 2},
    {"n_times_crossframe_attn_in_self": 2}, {"additional_tokens": None, "n_times_crossframe_attn_in_self": 0},
])  # fmt: skip
def test_tokens_and_frames_of_sgm(options):
    block = randomize(foreign.BlockOfTokens(16, 10)).eval()
    expected = block(TOKENS, CONTEXT, **options)
    fastgen.accelerate(block)
    assert error(block(TOKENS, CONTEXT, **options), expected.double()) < 1e-6
    assert error(block(TOKENS, CONTEXT, *options.values()) if len(options) == 2 else expected, expected.double()) < 1e-6


@torch.no_grad()
def test_a_mask_of_sgm_is_added_to_the_scores():
    attention = randomize(foreign.CrossAttentionOfTokens(16, 10)).eval()
    mask = randn(2, 1, 33, 7)
    expected = attention(TOKENS, CONTEXT, mask)
    assert error(fastgen.accelerate(attention)(TOKENS, CONTEXT, mask), expected.double()) < 1e-6


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_gradients_copies_and_pickles(name, checkpoint):
    model = randomize(TRANSFORMERS[name](ckpt=checkpoint))
    plain, x = copy.deepcopy(model), IMAGE.clone().requires_grad_()
    context = [c.requires_grad_() for c in context_of(name)] if name[0] == "2" else CONTEXT.clone().requires_grad_()
    of_context = context if isinstance(context, list) else [context]
    fastgen.accelerate(model)
    wanted = (x, *of_context)
    expected = torch.autograd.grad(plain(x, context).square().mean(), (*wanted, *plain.parameters()))
    assert list(model.state_dict()) == list(plain.state_dict())
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert mixin_of(other) is mixin_of(model) is not None
        found = torch.autograd.grad(other(x, context).square().mean(), (*wanted, *other.parameters()))
        for grad, like in zip(found, expected, strict=True):
            torch.testing.assert_close(grad, like, rtol=1e-4, atol=1e-5 * like.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_hooks_see_what_they_saw(name, layout):
    model, x = randomize(TRANSFORMERS[name]()).eval(), IMAGE.contiguous(memory_format=layout)
    paths = [path for path, module in model.named_modules() if not isinstance(module, nn.ModuleList)]
    for path in paths:
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(path).register_forward_hook(lambda m, a, y, to=seen: to.append(y))
        model(x, context_of(name))
        fastgen.accelerate(model)(x, context_of(name))
        before, after = (
            torch.cat([t.flatten() for t in half]) for half in (seen[: len(seen) // 2], seen[len(seen) // 2 :])
        )
        assert seen and error(after, before.double()) < WINOGRAD, path
        handle.remove()
        fastgen.restore(model)


@torch.no_grad()
@pytest.mark.parametrize("change", [
    lambda m: setattr(m, "proj_in", nn.Sequential(m.proj_in)),
    lambda m: setattr(m, "proj_out", randomize(nn.Conv2d(16, 12, 1, bias=False), seed=3)),
    lambda m: setattr(m.transformer_blocks[0], "norm2", nn.Identity()),
    lambda m: setattr(m.transformer_blocks[1].norm3, "eps", 0.1),
    lambda m: m.transformer_blocks[0].attn1.to_q.weight.mul_(2),
    lambda m: m.transformer_blocks[0].ff.net[0].proj.register_forward_hook(lambda module, args, output: 2 * output),
    lambda m: m.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    lambda m: m.load_state_dict({name: 0.5 * value for name, value in m.state_dict().items()}),
])  # fmt: skip
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_changes_later(change, layout):
    model, plain = (randomize(TRANSFORMERS["1"]()).eval() for _ in range(2))
    x = IMAGE.contiguous(memory_format=layout)
    fastgen.accelerate(model)(x, CONTEXT)
    change(model), change(plain)
    assert error(model(x, CONTEXT), plain(x, CONTEXT).double()) < WINOGRAD


@torch.no_grad()
def test_sums_and_norms_are_one_call(monkeypatch):
    calls: list[nn.Module] = []
    model = fastgen.accelerate(randomize(TRANSFORMERS["3"]()).eval())
    theirs = fusing.layer_norm
    monkeypatch.setattr(fusing, "layer_norm", lambda *args, **kwargs: calls.append(args) or theirs(*args, **kwargs))
    model(IMAGE, CONTEXT)
    assert len(calls) == 4


class Video(foreign.SpatialTransformer):
    """As sgm's SpatialVideoTransformer: with a forward of its own."""

    def forward(self, x, context=None, timesteps=None):
        return 2 * super().forward(x, context)


def test_what_is_left_alone_and_why():
    model = fastgen.accelerate(randomize(Video(12, 1, 10)))
    rows = {row.name: row for row in fastgen.report(model).rows}
    assert not rows[""].accelerated and rows[""].detail == "forward overridden by Video"
    assert rows["transformer_blocks.0"].accelerated and rows["transformer_blocks.0.attn1"].accelerated


@torch.no_grad()
def test_contexts_that_are_too_few_are_an_error_as_before():
    model = fastgen.accelerate(TRANSFORMERS["2"]())
    model.transformer_blocks.append(model.transformer_blocks[0])
    with pytest.raises(IndexError):
        model(IMAGE, [CONTEXT, CONTEXT])


class Casting(foreign.SpatialTransformer):
    def forward(self, x, context=None):
        with torch.autocast("cuda"):
            return super().forward(x, context)


Casting.__name__ = "SpatialTransformer"


def test_who_casts_is_found():
    from fastgen.integrations.latent_diffusion import casts

    assert casts(Casting) and not casts(foreign.SpatialTransformer)


@torch.no_grad()
def test_under_the_compiler_and_autocast():
    model = randomize(TRANSFORMERS["3"]()).eval()
    expected = model(IMAGE, CONTEXT)
    fastgen.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert error(compiled(IMAGE, CONTEXT), expected.double()) < WINOGRAD
    with torch.autocast("cpu", torch.bfloat16):
        assert error(model(IMAGE, CONTEXT), expected.double()) < 2e-2


@torch.no_grad()
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_in_half_precision(name):
    model = randomize(TRANSFORMERS[name]()).eval()
    exact = copy.deepcopy(model).double()(IMAGE.double(), context_of(name, torch.float64))
    plain = copy.deepcopy(model).bfloat16()
    x, context = IMAGE.bfloat16(), context_of(name, torch.bfloat16)
    fused = fastgen.accelerate(model.bfloat16())
    assert error(fused(x, context), exact) <= 2 * error(plain(x, context), exact)
    assert F.cosine_similarity(fused(x, context).flatten().double(), exact.flatten(), dim=0) > 0.99
