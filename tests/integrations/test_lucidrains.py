"""Stand-ins for the modules of imagen-pytorch, DALLE2-pytorch and make-a-video-pytorch, as `foreign_imagen` and the others write
them."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastgen
from fastgen.integrations.stand_in import mixin_of

from ..modules import randomize
from .foreign_dalle2 import Rotary, dalle2
from .foreign_imagen import imagen, imagen_video
from .foreign_lucidrains import EPS
from .foreign_make_a_video import make_a_video
from .numerics import assert_accelerated, error, in_float64

IMAGE, VIDEO, TOKENS, CONTEXT = (2, 12, 6, 7), (2, 12, 3, 6, 5), (2, 33, 12), (2, 7, 10)
BIAS = (2, 33, 34)
OF_IMAGE, OF_VIDEO = [(2, 12, 1, 1)] * 2, [(2, 12, 1, 1, 1)] * 2

# A module, the shapes of what it takes (a list is a tuple of tensors), options, and classes that become stand-ins besides its own.
CASES: dict[str, tuple[Callable[[], nn.Module], list, dict, tuple[str, ...]]] = {
    "LayerNorm": (lambda: imagen.LayerNorm(12), [TOKENS], {}, ()),
    "LayerNorm of channels": (lambda: imagen.LayerNorm(12, dim=-3), [IMAGE], {}, ()),
    "LayerNorm, video": (lambda: imagen_video.LayerNorm(12), [TOKENS], {}, ()),
    "LayerNorm, prior": (lambda: dalle2.LayerNorm(12, eps=1e-4), [TOKENS], {}, ()),
    "ChanLayerNorm": (lambda: dalle2.ChanLayerNorm(12, eps=1e-4), [IMAGE], {}, ()),
    "ChanLayerNorm, video": (lambda: imagen_video.ChanLayerNorm(12), [VIDEO], {}, ()),
    "ChanRMSNorm": (lambda: imagen.ChanRMSNorm(12), [IMAGE], {}, ()),
    "ChanRMSNorm, video": (lambda: imagen.ChanRMSNorm(12, video=True), [VIDEO], {}, ()),
    "RMSNorm": (lambda: make_a_video.RMSNorm(12), [VIDEO], {}, ()),
    "RMSNorm, image": (lambda: make_a_video.RMSNorm(12), [IMAGE], {}, ()),
    "RMSNorm, last": (lambda: make_a_video.RMSNorm(12, dim=-1), [TOKENS], {}, ()),
    "Block, imagen": (lambda: imagen.Block(12, 16), [IMAGE], {}, ("ChanRMSNorm", "Conv2d")),
    "Block, imagen, modulated": (lambda: imagen.Block(12, 16), [IMAGE, OF_IMAGE], {}, ("ChanRMSNorm", "Conv2d")),
    "Block, video": (lambda: imagen_video.Block(12, 16), [VIDEO, OF_VIDEO], {}, ("ChanRMSNorm", "Conv3d", "Conv2d")),
    "Block, video by frames": (lambda: imagen_video.Block(12, 16), [VIDEO], {"ignore_time": True}, ("Conv3d",)),
    "Block, DALLE2": (lambda: dalle2.Block(12, 16), [IMAGE], {}, ("GroupNorm", "Conv2d")),
    "Block, DALLE2, modulated": (lambda: dalle2.Block(16, 12), [(2, 16, 6, 7), OF_IMAGE], {}, ("GroupNorm", "Conv2d")),
    "Block, make-a-video": (lambda: make_a_video.Block(8, 12), [(2, 8, 3, 6, 5), OF_VIDEO], {"enable_time": True}, ("RMSNorm",)),
    "Block, make-a-video, image": (lambda: make_a_video.Block(8, 12), [(2, 8, 6, 5), OF_IMAGE], {}, ("RMSNorm",)),
    "Block, make-a-video, frames": (lambda: make_a_video.Block(8, 12), [(2, 8, 3, 6, 5)], {}, ("PseudoConv3d", "Conv2d")),
    "ResnetBlock": (lambda: dalle2.ResnetBlock(12, 16, time_cond_dim=24), [IMAGE, (2, 24)], {}, ("Block", "Conv2d")),
    "ResnetBlock without time": (lambda: dalle2.ResnetBlock(12, 12, time_cond_dim=24), [IMAGE], {}, ("Block",)),
    "Conv3d": (lambda: imagen_video.Conv3d(12, 16), [VIDEO], {}, ("Conv2d",)),
    "Conv3d, fewer frames": (lambda: imagen_video.Conv3d(12, 16, 5, temporal_kernel_size=3), [VIDEO], {}, ()),
    "Conv3d without time": (lambda: imagen_video.Conv3d(12, 16, 1), [VIDEO], {}, ()),
    "PseudoConv3d": (lambda: make_a_video.PseudoConv3d(12, 16), [VIDEO], {}, ("Conv2d",)),
    "PseudoConv3d, other kernel": (lambda: make_a_video.PseudoConv3d(12, 16, 3, temporal_kernel_size=5), [VIDEO], {}, ()),
    "PseudoConv3d, frames": (lambda: make_a_video.PseudoConv3d(12, 16), [VIDEO], {"enable_time": False}, ()),
    "PseudoConv3d, image": (lambda: make_a_video.PseudoConv3d(12, 16), [IMAGE], {}, ()),
    "PseudoConv3d without time": (lambda: make_a_video.PseudoConv3d(12, 16, 1), [VIDEO], {}, ()),
    "Attend": (lambda: make_a_video.Attend(0.5), [(2, 3, 33, 8), (2, 3, 7, 8), (2, 3, 7, 8)], {}, ()),
    "Attend, biased": (lambda: make_a_video.Attend(), [(2, 3, 9, 8)] * 3 + [(3, 9, 9)], {}, ()),
    "Attend, causal": (lambda: make_a_video.Attend(causal=True), [(2, 3, 9, 8)] * 3, {}, ()),
    "Attend, both": (lambda: make_a_video.Attend(causal=True), [(2, 3, 9, 8)] * 3 + [(3, 9, 9)], {}, ()),
    "Attend, causal to others": (lambda: make_a_video.Attend(causal=True), [(2, 3, 9, 8)] + [(2, 3, 12, 8)] * 2, {}, ()),
    "CrossAttention, imagen": (lambda: imagen.CrossAttention(12, 10), [TOKENS, CONTEXT], {}, ("LayerNorm",)),
    "CrossAttention, imagen, normed": (lambda: imagen.CrossAttention(12, 10, norm_context=True), [TOKENS, CONTEXT], {}, ()),
    "LinearCrossAttention": (lambda: imagen.LinearCrossAttention(12, 10), [TOKENS, CONTEXT], {}, ()),
    "CrossAttention, DALLE2": (lambda: dalle2.CrossAttention(12, 10), [TOKENS, CONTEXT], {}, ("LayerNorm",)),
    "CrossAttention, DALLE2, cosine": (lambda: dalle2.CrossAttention(12, 10, cosine_sim=True), [TOKENS, CONTEXT], {}, ()),
    "Attention, imagen": (lambda: imagen.Attention(12), [TOKENS], {}, ("LayerNorm",)),
    "Attention, imagen, context": (lambda: imagen.Attention(12, context_dim=10), [TOKENS, CONTEXT], {}, ()),
    "Attention, imagen, biased": (lambda: imagen.Attention(12), [TOKENS, None, None, BIAS], {}, ()),
    "Attention, video": (lambda: imagen_video.Attention(12, causal=True, rel_pos_bias=True), [TOKENS], {}, ("LayerNorm",)),
    "Attention, video, context": (lambda: imagen_video.Attention(12, context_dim=10), [TOKENS, CONTEXT], {}, ()),
    "Attention, video, causal": (lambda: imagen_video.Attention(12, causal=True), [TOKENS], {}, ()),
    "Attention, video, biased": (lambda: imagen_video.Attention(12), [TOKENS, None, None, (2, 33, 33)], {}, ()),
    "Attention, prior": (lambda: dalle2.Attention(12, causal=True, rotary_emb=Rotary()), [TOKENS, None, BIAS], {}, ()),
    "Attention, prior, causal": (lambda: dalle2.Attention(12, causal=True), [TOKENS], {}, ("LayerNorm",)),
    "Attention, DALLE2": (lambda: dalle2.Attention(12, dropout=0.5, cosine_sim=False), [TOKENS], {}, ()),
    "Attention, DALLE2, rotated": (lambda: dalle2.Attention(12, rotary_emb=Rotary(), cosine_sim=False), [TOKENS], {}, ()),
    "LinearAttention, imagen": (lambda: imagen.LinearAttention(12, dropout=0.5), [IMAGE], {}, ("LayerNorm", "Conv2d")),
    "LinearAttention, imagen, context": (lambda: imagen.LinearAttention(12, context_dim=10), [IMAGE, CONTEXT], {}, ()),
    "LinearAttention, DALLE2": (lambda: dalle2.LinearAttention(12), [IMAGE], {}, ("ChanLayerNorm", "Conv2d")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _epsilon_of_float64(monkeypatch):
    """Their norms in float64 have that of half precision: what is compared with has that of float32."""
    monkeypatch.setitem(EPS, torch.float64, EPS[torch.float32])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(name: str, dtype: torch.dtype = torch.float32) -> list:
    made = []
    for i, shape in enumerate(CASES[name][1]):
        if isinstance(shape, list):
            made.append(tuple(randn(*each, seed=10 + j).to(dtype) for j, each in enumerate(shape)))
        else:
            made.append(None if shape is None else randn(*shape, seed=i).to(dtype))
    return made


@pytest.mark.parametrize("name", CASES)
def test_in_every_mode(name):
    make, _, options, besides = CASES[name]
    call = lambda m, dtype: m(*inputs_of(name, dtype), **options)  # noqa: E731
    assert_accelerated(randomize(make()), call, (name.partition(",")[0].partition(" ")[0], *besides))


@pytest.mark.parametrize("name", CASES)
def test_gradients_copies_and_pickles(name):
    make, _, options, _ = CASES[name]
    module = randomize(make()).eval()

    def gradients(m, dtype=torch.float32):
        inputs = inputs_of(name, dtype)
        inputs[0].requires_grad_()
        wanted = (inputs[0], *m.parameters())
        found = torch.autograd.grad(m(*inputs, **options).sin().mean(), wanted, allow_unused=True)
        return [torch.zeros(()) if grad is None else grad for grad in found]

    exact, before = gradients(in_float64(module), torch.float64), gradients(module)
    least = 1e-6 * max(grad.norm() for grad in exact)
    fastgen.accelerate(module)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert mixin_of(other) is mixin_of(module) is not None
        for grad, own, true in zip(gradients(other), before, exact, strict=True):
            assert (grad - true).norm() <= 2 * (own - true).norm() + least


@torch.no_grad()
@pytest.mark.parametrize("name, dtype", [
    (name, dtype) for name in ("LayerNorm of channels", "ChanLayerNorm", "ChanRMSNorm", "RMSNorm", "Block, imagen")
    for dtype in (torch.bfloat16, torch.float16)
])  # fmt: skip
def test_in_half_precision(name, dtype, monkeypatch):
    module, inputs = randomize(CASES[name][0]()).eval(), inputs_of(name)
    monkeypatch.setitem(EPS, torch.float64, 1e-3)
    wide = copy.deepcopy(module).to(dtype).double()
    if hasattr(module, "fp16_eps"):
        wide.eps = module.fp16_eps
    exact = wide(*(x.to(dtype).double() for x in inputs))
    module = module.to(dtype)
    before = module(*(x.to(dtype) for x in inputs))
    after = fastgen.accelerate(module)(*(x.to(dtype) for x in inputs))
    assert mixin_of(module) is not None and after.dtype == before.dtype == dtype
    assert error(after, exact) <= 2 * error(before, exact)


@torch.no_grad()
@pytest.mark.parametrize("name", ["LayerNorm, prior", "LayerNorm", "ChanRMSNorm", "RMSNorm"])
def test_the_dtype_of_a_half_input_to_whole_weights(name):
    module, (x,) = randomize(CASES[name][0]()), inputs_of(name, torch.bfloat16)
    before = module(x)
    after = fastgen.accelerate(module)(x)
    assert after.dtype == before.dtype and error(after, before.double()) < 2e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["CrossAttention, imagen", "LinearCrossAttention", "CrossAttention, DALLE2"])
def test_a_mask_is_their_code(name):
    module, inputs = randomize(CASES[name][0]()), inputs_of(name)
    inputs.append(randn(2, 7) > 0)
    expected = module(*inputs)
    assert error(fastgen.accelerate(module)(*inputs), expected.double()) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("of", [(1, 16, 1, 1), (2, 16, 6, 7), (2, 1, 1, 1)])
@pytest.mark.parametrize("block", [imagen.Block, dalle2.Block, make_a_video.Block])
def test_scale_and_shift_of_other_shapes_are_their_code(block, of):
    module, x = randomize(block(16, 16)).eval(), randn(2, 16, 6, 7)
    modulation = randn(*of), randn(*of, seed=1)
    expected = module(x, modulation)
    assert error(fastgen.accelerate(module, exact=True)(x, modulation), expected.double()) < 1e-6


@torch.no_grad()
def test_what_is_set_later_is_their_code():
    for name, attribute, value in (("LayerNorm", "stable", True), ("RMSNorm", "dim", 2)):
        module, (x,) = randomize(CASES[name][0]()), inputs_of(name)
        fastgen.accelerate(module)
        setattr(module, attribute, value)
        x = x.transpose(1, 2) if attribute == "dim" else x
        found = module(x)
        assert torch.equal(found, fastgen.restore(module)(x))


@torch.no_grad()
@pytest.mark.parametrize("at", ["norm", "act", "project"])
@pytest.mark.parametrize("name", ["Block, imagen", "Block, DALLE2", "Block, make-a-video, image"])
def test_hooks_see_what_they_saw(name, at):
    module, inputs, seen = randomize(CASES[name][0]()).eval(), inputs_of(name), []
    child = getattr(module, at, None) or module.activation
    child.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    module(*inputs)
    fastgen.accelerate(module, exact=True)(*inputs)
    assert len(seen) == 2
    for after, before in zip(seen[1], seen[0], strict=True):
        assert error(after, before.double()) < 1e-6


@torch.no_grad()
def test_a_hook_between_the_norms_of_a_resnet_block():
    block, inputs, seen = randomize(CASES["ResnetBlock"][0]()).eval(), inputs_of("ResnetBlock"), []
    block.block1.register_forward_hook(lambda module, args, output: seen.append(output))
    block(*inputs)
    fastgen.accelerate(block)(*inputs)
    assert len(seen) == 2 and error(seen[1], seen[0].double()) < 2e-5


@torch.no_grad()
def test_under_the_compiler():
    """Names of the stand-in's are children of a module here, `project` of a block."""
    for name in ("Block, imagen", "Block, DALLE2", "Attention, video", "PseudoConv3d"):
        module, inputs = fastgen.accelerate(randomize(CASES[name][0]()).eval()), inputs_of(name)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert error(compiled(*inputs), module(*inputs).double()) < 2e-5


def test_what_a_module_calls_as_a_stand_in_does():
    block = fastgen.accelerate(imagen.Block(12, 16))
    assert isinstance(block.project, nn.Conv2d) and not hasattr(block, "takes") and not hasattr(block, "method")
    assert type(block).project == "imagen-pytorch"
    block.has = 3
    block.project = nn.Conv2d(12, 8, 1)
    assert block.has == 3 and block(randn(*IMAGE)).shape[1] == 8
    assert fastgen.restore(block).has == 3


class Scaled(imagen.ChanRMSNorm):
    def __init__(self, dim):
        super().__init__(dim)
        self.scale = 1.0


Scaled.__name__ = "ChanRMSNorm"


@pytest.mark.parametrize("module, reason", [
    (imagen.LayerNorm(12, stable=True), "divided by its largest element first"),
    (Scaled(12), "not normalize(x) * gamma * sqrt(C)"),
    (make_a_video.RMSNorm(12, dim=2), "not normalize(x) * gamma * sqrt(C) over channels or the last dimension"),
    (imagen.Block(12, 16, norm=False), "norm Identity, activation SiLU"),
    (dalle2.Block(12, 16, activation=nn.GELU), "activation GELU"),
    (dalle2.ResnetBlock(12, 16, cond_dim=10), "attention between its blocks"),
    (make_a_video.PseudoConv3d(12, 16, stride=2), "not of stride 1"),
])  # fmt: skip
def test_what_is_left_alone_and_why(module, reason):
    assert mixin_of(fastgen.accelerate(module)) is None
    (row,) = [row for row in fastgen.report(module).rows if row.name == ""]
    assert not row.accelerated and reason in row.detail


def test_attention_between_blocks_leaves_them_accelerated():
    block = randomize(dalle2.ResnetBlock(12, 16, cond_dim=10, time_cond_dim=24))
    inputs = [randn(*IMAGE), randn(2, 24), randn(*CONTEXT)]
    call = lambda m, dtype: m(*(x.to(dtype) for x in inputs))  # noqa: E731
    assert_accelerated(block, call, ("Block", "CrossAttention", "GroupNorm", "LayerNorm", "Conv2d"))


@torch.no_grad()
def test_dropout_of_attention_in_training_is_their_code():
    for module in (dalle2.Attention(12, dropout=0.5), make_a_video.Attend(0.5)):
        inputs = [randn(2, 3, 9, 8)] * 3 if isinstance(module, make_a_video.Attend) else [randn(*TOKENS)]
        drawn = []
        for accelerated in (False, True):
            torch.manual_seed(0)
            drawn.append((fastgen.accelerate(module) if accelerated else module).train()(*inputs))
        assert error(drawn[1], drawn[0].double()) < 1e-6
