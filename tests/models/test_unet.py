"""`UNet`: against the same network in plain torch, against diffusers' `UNet2DModel`, and as a module."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastgen.models import UNet
from fastgen.nn import Conv2d, GroupNorm, PlainGroupNorm, ResBlock, SpatialAttention

from ..backends import import_peer, requires_cpu
from ..modules import max_difference, randomize
from .diffusers_unets import copy_unet

SMALL = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "num_groups": 4}
VARIANTS = {
    "bias_conv": {"in_channels": 3},
    "scale_shift_updown": {
        "in_channels": 1,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "num_classes": 5,
        "null_class": True,
        "num_head_channels": 8,
    },
    "learned_sigma": {"in_channels": 2, "learn_sigma": True, "num_heads": 2, "attention_resolutions": [1, 2]},
    "no_convolutions": {"in_channels": 3, "conv_resample": False},
    "three_levels": {"in_channels": 3, "channel_mult": [1, 1, 3], "num_res_blocks": 2, "attention_resolutions": []},
}


def _build(variant, norm=GroupNorm, **options):
    return randomize(UNet(**{**SMALL, **VARIANTS[variant], **options}, norm=norm)).eval()


def _inputs(model, n=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, model.in_channels, 8, 12, generator=generator, dtype=dtype)
    y = None if model.num_classes is None else torch.arange(n) % model.num_classes
    return x, torch.tensor([0, 37, 999])[:n], y


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_plain_torch(variant):
    fused, plain = _build(variant), _build(variant, PlainGroupNorm)
    x, timesteps, y = _inputs(fused)
    expected = plain(x, timesteps, y)
    assert expected.std() > 0.1  # a network that answers nothing would agree with everything
    assert max_difference(fused(x, timesteps, y), expected) <= 1e-5
    result = fused(x.to(memory_format=torch.channels_last), timesteps, y)
    assert max_difference(result, expected) <= 1e-5
    if fused.out_channels > 1:
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_is_within_the_bound_of_winograd(variant, channels_last):
    """Whose error, 2e-5 of each convolution's output at most, adds up over the network; in truth it is a few 1e-6 of the result."""
    fused, plain = _build(variant).eval(), _build(variant, PlainGroupNorm).eval().double()
    x, timesteps, y = _inputs(fused)
    x = x.repeat(1, 1, 2, 2)
    with torch.no_grad():
        expected = plain(x.double(), timesteps, y)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        convolutions = [m for m in fused.modules() if isinstance(m, Conv2d)]
        assert len(convolutions) > 10
        error = (fused(x, timesteps, y) - expected).norm() / expected.norm()
    assert error <= 2e-5


@requires_cpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_concatenated_on_the_way_up_in_inference(variant):
    """Where the kernels take the 1x1 convolutions, as they do of images so small; the embedding of the timestep is made of two."""
    found = []
    for norm in (GroupNorm, PlainGroupNorm):
        model = _build(variant, norm)
        inputs = _inputs(model)
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
            model(*inputs)
        found.append(sum(event.count for event in seen.key_averages() if event.key == "aten::cat"))
    assert found == [1, 1 + len(model.output_blocks)]


@pytest.mark.parametrize("variant", ["scale_shift_updown", "learned_sigma"])
def test_features_are_channels_last_where_the_weights_are_and_in_inference(variant):
    """From the first block to the last, whatever an image of one channel says, whose strides may say either; the output lies as the
    image does."""
    model = _build(variant)
    x, timesteps, y = _inputs(model)
    layouts = []
    blocks = [module for module in model.modules() if isinstance(module, ResBlock)]
    for block in blocks:
        block.register_forward_hook(
            lambda module, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
        )
    expected = model(x, timesteps, y)
    assert len(layouts) == len(blocks) and not any(layouts)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layouts.clear()
        with torch.no_grad():
            result = model(x, timesteps, y)
            of_last = model(x.to(memory_format=torch.channels_last), timesteps, y)
        assert len(layouts) == 2 * len(blocks) and all(layouts)
        assert result.is_contiguous() == (memory_format == torch.contiguous_format or result.shape[1] == 1)
        assert of_last.is_contiguous(memory_format=torch.channels_last) or x.shape[1] == 1
        for each in (result, of_last):
            assert (each - expected).norm() <= 2e-5 * expected.norm()  # the bound of Winograd's convolutions
        model.to(memory_format=torch.channels_last)
        layouts.clear()
        model(x, timesteps, y)
        assert all(layouts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_plain_torch(variant):
    grads = []
    for norm in (GroupNorm, PlainGroupNorm):
        model = _build(variant, norm).double()
        x, timesteps, y = _inputs(model, dtype=torch.float64)
        loss = model(x.requires_grad_(), timesteps, y).square().mean()
        grads.append(torch.autograd.grad(loss, [x, *model.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        assert max_difference(ours, theirs) <= 1e-10


def test_every_norm_is_the_fused_one():
    model = _build("scale_shift_updown")
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    # two a residual block, one an attention, one at the end
    blocks = sum(isinstance(module, ResBlock) for module in model.modules())
    attentions = sum(isinstance(module, SpatialAttention) for module in model.modules())
    assert len(norms) == 2 * blocks + attentions + 1
    assert all(type(norm) is GroupNorm for norm in norms)
    assert not any(isinstance(module, nn.SiLU) for module in model.modules())
    assert model.out_norm.activation == "silu"


@pytest.mark.parametrize("classes", [None, 7])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_is_unet_2d_model_of_diffusers(scale_shift, classes):
    diffusers = import_peer("diffusers")
    model = UNet(
        3, 16, channel_mult=[1, 2, 2], num_res_blocks=2, attention_resolutions=[2], num_head_channels=8, num_groups=4,
        use_scale_shift_norm=scale_shift, num_classes=classes,
    )  # fmt: skip
    randomize(model).eval()
    peer = diffusers.UNet2DModel(
        in_channels=3, out_channels=3, block_out_channels=(16, 32, 32), layers_per_block=2, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, norm_eps=1e-5,
        attn_norm_num_groups=4, resnet_time_scale_shift="scale_shift" if scale_shift else "default",
            num_class_embeds=classes,
    ).eval()  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())
    copy_unet(model, peer)
    x, timesteps, y = _inputs(model)
    with torch.no_grad():
        expected = peer(x, timesteps, class_labels=y).sample
        assert expected.std() > 0.1
        assert max_difference(model(x, timesteps, y), expected) <= 1e-5


def test_starts_at_zero():
    model = UNet(1, **SMALL)
    x, timesteps, _ = _inputs(model)
    assert torch.equal(model(x, timesteps), torch.zeros_like(x))


def test_classes_and_the_null_class():
    model = _build("scale_shift_updown")
    x, timesteps, y = _inputs(model)
    x, timesteps = x[:1].expand(3, -1, -1, -1), timesteps[1:2].expand(3)
    outputs = model(x, timesteps, y)
    assert max_difference(outputs[0], outputs[1]) > 1e-3
    assert model.null_label == 5
    null = torch.full((3,), model.null_label)
    assert torch.equal(model(x, timesteps), model(x, timesteps, null))
    assert max_difference(model(x, timesteps), outputs) > 1e-3
    assert _build("bias_conv").null_label is None


def test_a_scalar_timestep_is_one_for_all():
    model = _build("bias_conv")
    x, _, _ = _inputs(model)
    assert torch.equal(model(x, torch.tensor(37)), model(x, torch.full((3,), 37)))


def test_low_precision_runs_and_is_close():
    model = _build("three_levels")
    x, timesteps, _ = _inputs(model)
    expected = model(x, timesteps)
    result = model.bfloat16()(x.bfloat16(), timesteps)
    assert result.dtype == torch.bfloat16
    assert (result - expected).norm() <= 0.05 * expected.norm()


def test_learned_sigma_doubles_the_output():
    model = _build("learned_sigma")
    x, timesteps, _ = _inputs(model)
    assert model.out_channels == 4
    assert model(x, timesteps).shape == (3, 4, 8, 12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_state_dict_pickle_deepcopy(variant):
    model = _build(variant)
    x, timesteps, y = _inputs(model)
    expected = model(x, timesteps, y)
    twin = UNet.from_config(model.config).eval()
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    for other in (twin, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(x, timesteps, y), expected)


def test_meta_construction_and_forward():
    with torch.device("meta"):
        model = UNet(3, 128, num_classes=1000, learn_sigma=True)
    assert all(p.is_meta for p in model.parameters())
    output = model(
        torch.empty(2, 3, 32, 32, device="meta"), torch.zeros(2, device="meta"), torch.zeros(2, device="meta").long()
    )
    assert output.is_meta and output.shape == (2, 6, 32, 32)


def test_print():
    text = repr(_build("scale_shift_updown"))
    for part in ("ResBlock(", "use_scale_shift_norm=True", "SpatialAttention(", "activation='silu'", "class_embedding"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, r"in_channels must be a positive integer, got 0"),
        ({"num_res_blocks": 1.5}, r"num_res_blocks must be a positive integer, got 1.5"),
        (
            {"channel_mult": []},
            r"channel_mult must be positive numbers, one a level, whose products with model_channels=16 are .*, got \[\]",
        ),
        ({"channel_mult": [0.3]}, r"channel_mult must be .*, got \[0.3\]"),
        (
            {"attention_resolutions": [3]},
            r"attention_resolutions must be downsampling factors among \[1, 2\], got \[3\]",
        ),
        ({"num_groups": 5}, r"num_groups must divide every width \[16, 32\], got num_groups=5"),
        ({"num_classes": 0}, r"num_classes must be None or positive, got 0"),
        ({"null_class": True}, r"null_class needs num_classes"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"num_head_channels": 5}, r"num_head_channels must divide channels, got num_head_channels=5"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(**{"in_channels": 1, **SMALL, **options})


def test_bad_config():
    with pytest.raises(ValueError, match=r"unknown keys \['depth', 'norm'\]; the known ones are \['in_channels'"):
        UNet.from_config({"depth": 3, "norm": "batch"})


def test_bad_inputs():
    model = _build("scale_shift_updown")
    x, timesteps, y = _inputs(model)
    cases = [
        ((x[:, 0], timesteps, y), r"x must be \[N, 1, H, W\], got shape \(3, 8, 12\)"),
        ((x.expand(3, 2, 8, 12), timesteps, y), r"x must be \[N, 1, H, W\], got shape \(3, 2, 8, 12\)"),
        ((x[..., :7], timesteps, y), r"height and width of x must be divisible by 2, got shape \(3, 1, 8, 7\)"),
        ((x, timesteps[:2], y), r"timesteps must be \[N\] = \[3\] or a scalar, got shape \(2,\)"),
        ((x, timesteps, y[:2]), r"y must be \[N\] = \[3\] integers, got shape \(2,\) of torch.int64"),
        ((x, timesteps, y.float()), r"y must be \[N\] = \[3\] integers, got shape \(3,\) of torch.float32"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match=r"the model has no classes \(num_classes=None\), got y"):
        UNet(1, **SMALL)(x, timesteps, y)
    with pytest.raises(ValueError, match=r"y is needed, the model has 5 classes and no null class"):
        UNet(1, **SMALL, num_classes=5)(x, timesteps)
