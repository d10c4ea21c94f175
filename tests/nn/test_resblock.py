"""`ResBlock` against diffusers' `ResnetBlock2D`, in every mode that both have, and the modes that only we have."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fastgen.nn import GroupNorm, PlainGroupNorm, ResBlock

from ..backends import import_peer, requires_cpu
from ..modules import max_difference, randomize
from .diffusers_weights import copy_resblock

EMBEDDING = 24


def _inputs(channels=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, channels, 6, 8, generator=generator, dtype=dtype)
    return x, torch.randn(3, EMBEDDING, generator=generator, dtype=dtype)


@pytest.mark.parametrize("out_channels", [16, 32])
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_is_resnet_block_2d(scale_shift, resample, out_channels):
    resnet = import_peer("diffusers.models.resnet")
    block = ResBlock(
        16,
        out_channels,
        embedding_channels=EMBEDDING,
        use_scale_shift_norm=scale_shift,
        resample=resample,
        num_groups=4,
    )
    randomize(block)
    peer = resnet.ResnetBlock2D(
        in_channels=16, out_channels=out_channels, temb_channels=EMBEDDING, groups=4, eps=1e-5,
        time_embedding_norm="scale_shift" if scale_shift else "default", up=resample == "up", down=resample == "down",
    )  # fmt: skip
    copy_resblock(block, peer)
    x, embedding = _inputs()
    for given in (x, x.to(memory_format=torch.channels_last)):
        assert max_difference(block(given, embedding), peer(x, embedding)) <= 1e-5


def test_without_embedding_is_resnet_block_2d():
    resnet = import_peer("diffusers.models.resnet")
    block = randomize(ResBlock(16, 32, num_groups=4, eps=1e-6))
    peer = resnet.ResnetBlock2D(in_channels=16, out_channels=32, temb_channels=None, groups=4, eps=1e-6)
    copy_resblock(block, peer)
    x, _ = _inputs()
    assert max_difference(block(x), peer(x, None)) <= 1e-5


@pytest.mark.parametrize("scale_shift", [False, True])
def test_gradients_are_those_of_plain_torch(scale_shift):
    options = {"embedding_channels": EMBEDDING, "use_scale_shift_norm": scale_shift, "num_groups": 4}
    fused = randomize(ResBlock(16, 32, **options)).double()
    plain = ResBlock(16, 32, norm=PlainGroupNorm, **options).double()
    plain.load_state_dict(fused.state_dict())
    grads = []
    for block in (fused, plain):
        x, embedding = (tensor.requires_grad_() for tensor in _inputs(dtype=torch.float64))
        grads.append(torch.autograd.grad(block(x, embedding).square().sum(), [x, embedding, *block.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        assert max_difference(ours, theirs) <= 1e-9


def test_the_embedding_goes_into_the_second_norm():
    seen = {}

    class Spy(GroupNorm):
        def forward(self, input, **extra):
            seen[id(self)] = set(extra)
            return super().forward(input, **extra)

    for scale_shift, expected in ((False, {"channel_bias"}), (True, {"scale", "shift"})):
        block = ResBlock(16, embedding_channels=EMBEDDING, use_scale_shift_norm=scale_shift, num_groups=4, norm=Spy)
        block(*_inputs())
        assert seen[id(block.norm1)] == set() and seen[id(block.norm2)] == expected
        assert block.norm1.activation == block.norm2.activation == "silu"


def test_skip_of_three_by_three():
    block = randomize(ResBlock(16, 32, num_groups=4, skip_kernel_size=3))
    x, _ = _inputs()
    with torch.no_grad():
        block.conv2.weight.zero_(), block.conv2.bias.zero_()
    assert max_difference(block(x), F.conv2d(x, block.skip.weight, block.skip.bias, padding=1)) <= 1e-6


def test_dropout_acts_in_training_only():
    block = randomize(ResBlock(16, dropout=0.5, num_groups=4))
    x, _ = _inputs()
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_starts_as_its_skip():
    x, embedding = _inputs()
    assert torch.equal(ResBlock(16, embedding_channels=EMBEDDING, num_groups=4)(x, embedding), x)
    block = ResBlock(16, embedding_channels=EMBEDDING, num_groups=4, zero_init=False)
    assert not torch.equal(block(x, embedding), x)


def test_pickle_deepcopy_print_meta():
    block = randomize(ResBlock(16, 32, embedding_channels=EMBEDDING, resample="down", num_groups=4))
    x, embedding = _inputs()
    expected = block(x, embedding)
    for twin in (pickle.loads(pickle.dumps(block)), copy.deepcopy(block)):
        assert torch.equal(twin(x, embedding), expected)
    text = repr(block)
    assert "16, 32" in text and "activation='silu'" in text and "Downsample" in text
    with torch.device("meta"):
        meta = ResBlock(16, 32, embedding_channels=EMBEDDING, resample="down", num_groups=4)
    assert meta(x.to("meta"), embedding.to("meta")).shape == expected.shape == (3, 32, 3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resample": "sideways"}, r"resample must be None, 'up' or 'down', got 'sideways'"),
        ({"skip_kernel_size": 2}, r"skip_kernel_size must be 1 or 3, got 2"),
        ({"use_scale_shift_norm": True}, r"use_scale_shift_norm needs embedding_channels"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ResBlock(16, num_groups=4, **options)


def test_embedding_missing_or_superfluous():
    x, embedding = _inputs()
    with pytest.raises(ValueError, match=r"takes one of shape \[N, embedding_channels\] as embedding, got None"):
        ResBlock(16, embedding_channels=EMBEDDING, num_groups=4)(x)
    with pytest.raises(ValueError, match=r"takes none as embedding, got a tensor of shape \(3, 24\)"):
        ResBlock(16, num_groups=4)(x, embedding)


def on_the_way_up(dtype=torch.float32, layout=torch.channels_last, **options):
    """A block, and its two inputs with an embedding, of shapes that the kernels take."""
    block = randomize(ResBlock(40, 8, embedding_channels=EMBEDDING, num_groups=4, **options)).to(dtype)
    x, embedding = _inputs(40, dtype)
    first, second = (part.to(memory_format=layout) for part in x.split([23, 17], 1))
    return block, first, second, embedding


def copies(call) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as seen, torch.no_grad():
        call()
    return sum(event.count for event in seen.key_averages() if event.key == "aten::cat")


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_inputs_are_those_in_one(dtype, layout, scale_shift):
    """Bit by bit where the kernels or one tensor made of both are read; else the library multiplies them apart."""
    block, first, second, embedding = on_the_way_up(dtype, layout, use_scale_shift_norm=scale_shift)
    whole = torch.cat([first, second], 1)
    with torch.no_grad():
        same = layout == torch.contiguous_format or dtype != torch.float32 or block.skip.plan(whole).outputs
        difference = max_difference(block(first, embedding, skip=second), block(whole, embedding))
        assert difference == 0 if same else difference <= 1e-5
    assert torch.equal(block(first, embedding, skip=second), block(whole, embedding))
    plain = randomize(ResBlock(40, 8, embedding_channels=EMBEDDING, num_groups=4, norm=PlainGroupNorm)).to(dtype)
    assert torch.equal(plain(first, embedding, skip=second), plain(whole, embedding))


@requires_cpu
def test_two_inputs_are_not_made_one_where_the_kernels_read_them():
    block, first, second, embedding = on_the_way_up()
    assert copies(lambda: block(first, embedding, skip=second)) == 0
    assert copies(lambda: block(torch.cat([first, second], 1), embedding)) == 1  # which it would see
    for where in ("up", "down"):
        other = randomize(ResBlock(40, 8, num_groups=4, resample=where))
        assert copies(lambda other=other: other(first, skip=second)) == 1
    another = type("Another", (PlainGroupNorm,), {})  # a norm that takes one input
    plain = randomize(ResBlock(40, 8, num_groups=4, norm=another))
    assert copies(lambda: plain(first, skip=second)) == 1
    hook = block.skip.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    seen = []
    assert copies(lambda: block(first, embedding, skip=second)) == 1 and seen == [40]  # who looks at it sees one input
    hook.remove()
    assert copies(lambda: block(first, embedding, skip=second)) == 0


def test_gradients_of_two_inputs():
    block, first, second, embedding = on_the_way_up(torch.float64)
    leaves = [t.clone().requires_grad_() for t in (first, second)]
    ours = torch.autograd.grad(
        block(leaves[0], embedding, skip=leaves[1]).square().sum(), [*leaves, *block.parameters()]
    )
    theirs = torch.autograd.grad(block(torch.cat(leaves, 1), embedding).square().sum(), [*leaves, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_two_inputs_compiled():
    torch._dynamo.reset()
    block, first, second, embedding = on_the_way_up()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert max_difference(compiled(first, embedding, skip=second), block(first, embedding, skip=second)) <= 1e-5
