"""Stand-ins for the modules of k-diffusion, as `foreign_k_diffusion` writes them, in every mode that these have."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastgen
from fastgen.integrations.stand_in import mixin_of

from ..modules import randomize
from . import foreign_k_diffusion as foreign
from .numerics import WINOGRAD, assert_accelerated, error


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


norm = functools.partial(foreign.AdaGN, 24, num_groups=4)
CONDITION = {"cond": randn(2, 24), "cross": randn(2, 7, 12), "cross_padding": (randn(2, 7) > 0.5).float()}
IMAGES = {
    "AdaGN": lambda: norm(16),
    "SelfAttention2d": lambda: foreign.SelfAttention2d(16, 2, norm),
    "CrossAttention2d": lambda: foreign.CrossAttention2d(16, 12, 2, norm),
    "ResConvBlock": lambda: foreign.ResConvBlock(24, 16, 16, 0.5),
    "ResConvBlock of more channels": lambda: foreign.ResConvBlock(24, 16, 24),
    "ResConvBlock, tanh": lambda: foreign.ResConvBlock(
        24, 16, 16, activation=functools.partial(nn.GELU, approximate="tanh")
    ),
}
RESAMPLING = {
    "Downsample2d": foreign.Downsample2d, "Downsample2d, cubic": lambda: foreign.Downsample2d("cubic", "replicate"),
    "Upsample2d": foreign.Upsample2d, "Upsample2d, cubic": lambda: foreign.Upsample2d("cubic"),
}  # fmt: skip
TOKENS = {  # with the shapes of what each takes
    "RMSNorm": (lambda: foreign.RMSNorm(16), [(2, 33, 16)]),
    "AdaRMSNorm": (lambda: foreign.AdaRMSNorm(16, 24), [(2, 33, 16), (2, 1, 24)]),
    "AdaRMSNorm of v2": (lambda: foreign.AdaRMSNorm(16, 24, version=2), [(2, 6, 2, 16), (2, 24)]),
    "LinearGEGLU": (lambda: foreign.LinearGEGLU(16, 24), [(2, 6, 7, 16)]),
    "FeedForwardBlock": (lambda: foreign.FeedForwardBlock(16, 40, 24, 0.5), [(2, 33, 16), (2, 1, 24)]),
    "SelfAttentionBlock": (lambda: foreign.SelfAttentionBlock(16, 8, 0.5), [(2, 33, 16), (33, 4), None, (2, 1, 16)]),
    "SelfAttentionBlock with a mask": (
        lambda: foreign.SelfAttentionBlock(16, 8), [(2, 33, 16), (33, 4), (33, 33), (2, 1, 16)],
    ),
}  # fmt: skip


def condition(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) for name, value in CONDITION.items()}


def inputs_of(name: str, dtype: torch.dtype) -> list[torch.Tensor | None]:
    return [None if shape is None else randn(*shape).to(dtype) for shape in TOKENS[name][1]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", IMAGES)
def test_of_images(name, layout):
    x = randn(2, 16, 6, 7).contiguous(memory_format=layout)
    expected = (name.partition(" ")[0].strip(","),)
    assert_accelerated(randomize(IMAGES[name]()), lambda m, dtype: m(x.to(dtype), condition(dtype)), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", RESAMPLING)
def test_resampling(name, layout):
    x = randn(2, 16, 10, 12).contiguous(memory_format=layout)
    assert_accelerated(RESAMPLING[name](), lambda m, dtype: m(x.to(dtype)), (name.partition(",")[0],))


@pytest.mark.parametrize("name", RESAMPLING)
def test_gradients_of_resampling(name):
    x, module = randn(2, 3, 10, 12).requires_grad_(), RESAMPLING[name]()
    (expected,) = torch.autograd.grad(module(x).square().mean(), x)
    (found,) = torch.autograd.grad(fastgen.accelerate(module)(x).square().mean(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("change", [
    lambda m: setattr(m, "skip", nn.Sequential(m.skip)),
    lambda m: m.main.insert(0, nn.Identity()),
    lambda m: m.main.__setitem__(1, nn.SiLU()),
    lambda m: m.main.__setitem__(2, randomize(nn.Conv2d(16, 16, 1), seed=3)),
    lambda m: m.main[0].register_forward_hook(lambda module, args, output: output + 1),
    lambda m: m.main[1].register_forward_hook(lambda module, args, output: output + 1),
    lambda m: m.main[7].register_forward_hook(lambda module, args, output: output + 1),
    lambda m: m.main.register_forward_hook(lambda module, args, output: output + 1),
    lambda m: m.main[4].mapper.weight.mul_(2),
])  # fmt: skip
def test_blocks_that_change_later(change):
    model, plain = (randomize(foreign.ResConvBlock(24, 16, 16)).eval() for _ in range(2))
    x, cond = randn(2, 16, 6, 7), condition(torch.float32)
    fastgen.accelerate(model)(x, cond)
    change(model), change(plain)
    assert error(model(x, cond), plain(x, cond).double()) < WINOGRAD


@pytest.mark.parametrize("name", TOKENS)
def test_of_tokens(name):
    assert_accelerated(
        randomize(TOKENS[name][0]()), lambda m, dtype: m(*inputs_of(name, dtype)), (name.partition(" ")[0],)
    )


def test_feed_forward_of_v2_by_its_parts():
    block = randomize(foreign.FeedForwardBlock(16, 40, 24, version=2))
    call = lambda m, dtype: m(randn(2, 6, 7, 16).to(dtype), randn(2, 24).to(dtype))  # noqa: E731
    assert_accelerated(block, call, ("AdaRMSNorm", "LinearGEGLU"))
    assert mixin_of(fastgen.accelerate(block)) is None


@torch.no_grad()
@pytest.mark.parametrize("name", IMAGES)
def test_one_condition_for_all_is_their_code(name):
    """[1, F], which they broadcast."""
    module, x = randomize(IMAGES[name]()).eval(), randn(2, 16, 6, 7)
    given = CONDITION | {"cond": randn(1, 24)}
    expected = module(x, given)
    assert error(fastgen.accelerate(module)(x, given), expected.double()) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("x, cond", [((2, 5, 2, 16), (2, 24)), ((2, 2, 5, 16), (2, 1, 24)), ((2, 5, 16), (24,))])
def test_other_shapes_are_their_code(x, cond):
    """Conditions that v1 broadcasts over other dimensions."""
    module, x, cond = randomize(foreign.AdaRMSNorm(16, 24)), randn(*x), randn(*cond)
    expected = module(x, cond)
    assert torch.equal(fastgen.accelerate(module)(x, cond), expected)


class NormOfAnother(foreign.RMSNorm):
    """Of the same look, with its epsilon elsewhere."""

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.scale


NormOfAnother.__name__ = "RMSNorm"


class GateFirst(nn.Linear):
    def forward(self, x):
        gate, h = super().forward(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


GateFirst.__name__ = "LinearGEGLU"


class Smaller(foreign.Downsample2d):
    """Of the same look, and of another step."""

    def forward(self, x):
        x = F.pad(x, 4 * [self.pad], self.pad_mode)
        return F.conv2d(x, self.of_all(x), stride=3)


Smaller.__name__ = "Downsample2d"


@pytest.mark.parametrize("module, reason", [
    (foreign.SelfAttention2d(16, 2, norm, 0.5), "dropout 0.5, of evaluation too"),
    (foreign.CrossAttention2d(16, 12, 2, norm, 0.5), "dropout 0.5, of evaluation too"),
    (foreign.RMSNorm((2, 16)), "not the root mean square of the last dimension"),
    (NormOfAnother(16), "not the root mean square of the last dimension"),
    (GateFirst(16, 32), "not the first half of a linear times GELU of the second"),
    (foreign.ResConvBlock(24, 16, 16, activation=nn.SiLU), "layers in another order than norm, GELU, convolution, dropout"),
    (Smaller(), "not a kernel [k, k] for each channel"),
    (
        foreign.ConditionedResidualBlock(*foreign.ResConvBlock(24, 16, 16).main, skip=nn.Sequential(nn.Identity())),
        "a skip connection of class",
    ),
])  # fmt: skip
def test_what_is_left_alone_and_why(module, reason):
    assert mixin_of(fastgen.accelerate(module)) is None
    (row,) = [row for row in fastgen.report(module).rows if row.name == ""]
    assert not row.accelerated and reason in row.detail


@torch.no_grad()
def test_a_hook_on_the_gate_sees_what_it_saw():
    block, seen = randomize(foreign.FeedForwardBlock(16, 40, 24)).eval(), []
    block.act.register_forward_hook(lambda module, args, output: seen.append(output))
    inputs = inputs_of("FeedForwardBlock", torch.float32)
    block(*inputs), fastgen.accelerate(block)(*inputs)
    assert len(seen) == 2 and error(seen[1], seen[0].double()) < 1e-6


@pytest.mark.parametrize("name", [*IMAGES, *TOKENS])
def test_gradients_copies_and_pickles(name):
    if name in IMAGES:
        inputs = [randn(2, 16, 6, 7), CONDITION]
        module = randomize(IMAGES[name]()).eval()
    else:
        inputs = inputs_of(name, torch.float32)
        module = randomize(TOKENS[name][0]()).eval()
    inputs[0].requires_grad_()
    plain = copy.deepcopy(module)
    fastgen.accelerate(module)
    expected = torch.autograd.grad(plain(*inputs).square().mean(), (inputs[0], *plain.parameters()))
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert mixin_of(other) is mixin_of(module) is not None
        found = torch.autograd.grad(other(*inputs).square().mean(), (inputs[0], *other.parameters()))
        for grad, like in zip(found, expected, strict=True):
            torch.testing.assert_close(grad, like, rtol=1e-4, atol=1e-5 * like.abs().max().item())


@torch.no_grad()
def test_their_counter_of_operations_counts(monkeypatch):
    module, x = randomize(foreign.LinearGEGLU(16, 24)), randn(2, 16)
    expected = module(x)
    fastgen.accelerate(module)
    flops = type("flops", (), {"state": type("state", (), {"flop_counter": object()})})
    monkeypatch.setattr(foreign, "flops", flops, raising=False)
    assert torch.equal(module(x), expected)
