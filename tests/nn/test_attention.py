"""`SpatialAttention` and `SingleHeadAttention` against diffusers' `Attention` and against their formula."""

import copy
import math
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.nn import PlainGroupNorm, SingleHeadAttention, SpatialAttention

from ..backends import import_peer
from ..modules import max_difference, randomize
from .diffusers_weights import copy_attention


def _input(dtype=torch.float32):
    return torch.randn(2, 24, 4, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("options", [{}, {"num_heads": 3}, {"num_head_channels": 6}], ids=["one", "heads", "channels"])
def test_is_attention_of_diffusers(options):
    processor = import_peer("diffusers.models.attention_processor")
    block = randomize(SpatialAttention(24, num_groups=4, **options))
    peer = processor.Attention(
        24, heads=block.num_heads, dim_head=24 // block.num_heads, norm_num_groups=4, eps=1e-5, bias=True,
        residual_connection=True, upcast_softmax=True, rescale_output_factor=1.0, _from_deprecated_attn_block=True,
    )  # fmt: skip
    copy_attention(block, peer)
    x = _input()
    for given in (x, x.to(memory_format=torch.channels_last)):
        assert max_difference(block(given), peer(x)) <= 1e-5


def test_is_its_formula():
    block = randomize(SpatialAttention(24, num_heads=2, num_groups=4)).double()
    x = _input(torch.float64)
    tokens = block.norm(x).flatten(2).mT  # [N, S, C]
    q, k, v = (tokens @ w.mT + b for w, b in zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3), strict=True))
    heads = []
    for head in (slice(0, 12), slice(12, 24)):
        weights = torch.softmax(q[..., head] @ k[..., head].mT / math.sqrt(12), dim=-1)
        heads.append(weights @ v[..., head])
    expected = x + block.proj(torch.cat(heads, -1)).mT.reshape(x.shape)
    assert max_difference(block(x), expected) <= 1e-12


def test_gradients_and_layout():
    fused = randomize(SpatialAttention(24, num_heads=2, num_groups=4)).double()
    plain = SpatialAttention(24, num_heads=2, num_groups=4, norm=PlainGroupNorm).double()
    plain.load_state_dict(fused.state_dict())
    grads = []
    for block, layout in ((fused, torch.channels_last), (plain, torch.contiguous_format)):
        x = _input(torch.float64).to(memory_format=layout).requires_grad_()
        y = block(x)
        assert y.is_contiguous(memory_format=layout)
        grads.append(torch.autograd.grad(y.square().sum(), [x, *block.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        assert max_difference(ours, theirs) <= 1e-9


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("hooked", [False, True])
def test_single_head_attention(layout, hooked):
    """That of one head whose q, k and v lie together; layers with hooks are called as such."""
    fused = randomize(SingleHeadAttention(24, num_groups=4)).double()
    plain = SingleHeadAttention(24, num_groups=4, norm=PlainGroupNorm).double()
    plain.load_state_dict(fused.state_dict())
    together = SpatialAttention(24, num_groups=4, eps=1e-6, norm=PlainGroupNorm).double()
    parts = (fused.q, fused.k, fused.v)
    state = {f"norm.{name}": value for name, value in fused.norm.state_dict().items()}
    state |= {f"proj.{name}": value for name, value in fused.proj_out.state_dict().items()}
    state |= {f"qkv.{name}": torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias")}
    together.load_state_dict(state)
    called = []
    if hooked:
        fused.v.register_forward_hook(lambda *_: called.append(True))
    grads = []
    for block in (fused, plain):
        x = _input(torch.float64).to(memory_format=layout).requires_grad_()
        y = block(x)
        assert y.is_contiguous(memory_format=layout) and max_difference(y, together(x)) <= 1e-12
        grads.append(torch.autograd.grad(y.square().sum(), [x, *block.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        assert max_difference(ours, theirs) <= 1e-9
    assert bool(called) == hooked
    for twin in (pickle.loads(pickle.dumps(plain)), copy.deepcopy(fused)):
        assert max_difference(twin(x), y) <= 1e-12


def test_starts_as_identity_pickles_copies_prints():
    x = _input()
    block = SpatialAttention(24, num_heads=2, num_groups=4)
    assert torch.equal(block(x), x)
    randomize(block)
    for twin in (pickle.loads(pickle.dumps(block)), copy.deepcopy(block)):
        assert torch.equal(twin(x), block(x))
    assert "24, num_heads=2" in repr(block)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"num_heads must divide channels, got num_heads=5 and channels=24"):
        SpatialAttention(24, num_heads=5, num_groups=4)
    with pytest.raises(ValueError, match=r"num_head_channels must divide channels, got num_head_channels=7"):
        SpatialAttention(24, num_head_channels=7, num_groups=4)


class Copies(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy", "contiguous"):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [SpatialAttention, SingleHeadAttention])
def test_no_copy_on_the_way(cls, dtype, layout):
    block = randomize(cls(24, num_groups=4)).to(dtype)
    x = _input(dtype).contiguous(memory_format=layout)
    with torch.no_grad(), Copies() as copies:
        y = block(x)
    assert copies.names == []
    assert y.is_contiguous(memory_format=layout)


def test_hooks_and_stand_ins_of_its_layers_are_called():
    x, seen = _input(), []
    block = randomize(SpatialAttention(24, num_heads=2, num_groups=4))
    expected = block(x)
    handle = block.proj.register_forward_hook(lambda *_: seen.append("hook"))
    assert max_difference(block(x), expected) <= 1e-5 and seen == ["hook"]
    handle.remove()
    block.qkv = torch.nn.Sequential(block.qkv)
    assert max_difference(block(x), expected) <= 1e-5
