"""`UNetCondition`: against the same network in plain torch, against diffusers' `UNet2DConditionModel`, and as a module."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastgen.models import CheckpointError, UNet, UNetCondition
from fastgen.nn import Conv2d, GroupNorm, PlainGroupNorm, ResBlock, SpatialTransformer

from ..backends import import_peer
from ..modules import copy_parameters, max_difference, randomize
from .diffusers_unets import copy_unet

SMALL = {
    "in_channels": 4, "model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2],
    "context_dim": 12, "num_heads": 2, "num_groups": 4,
}  # fmt: skip
VARIANTS = {
    "convolutions": {"attention_resolutions": [1, 2]},
    "linear": {"use_linear_in_transformer": True, "num_head_channels": 8},
    "vectors": {
        "use_linear_in_transformer": True,
        "channel_mult": [1, 1, 2],
        "attention_resolutions": [2, 4],
        "transformer_depth": [0, 1, 3],
        "adm_in_channels": 10,
    },
    "classes": {"num_classes": 5, "null_class": True, "transformer_depth": 2, "out_channels": 2, "in_channels": 9},
    "no_context": {"context_dim": None, "transformer_depth_middle": 2},
    "inside": {"use_scale_shift_norm": True, "resblock_updown": True},
    "means": {"conv_resample": False, "channel_mult": [0.5, 1]},
}
# The models whose sizes the documentation names, and how many parameters those of the field have.
SIZES = {
    "sd15": ({}, 859_520_964),
    "sd21": ({"context_dim": 1024, "num_head_channels": 64, "use_linear_in_transformer": True}, 865_910_724),
    "sdxl": (
        {
            "channel_mult": (1, 2, 4), "attention_resolutions": (2, 4), "transformer_depth": (0, 2, 10),
            "context_dim": 2048, "num_head_channels": 64, "use_linear_in_transformer": True, "adm_in_channels": 2816,
        },
        2_567_463_684,
    ),
}  # fmt: skip


def _build(variant, norm=GroupNorm, **options):
    return randomize(UNetCondition(**{**SMALL, **VARIANTS[variant], **options}, norm=norm)).eval()


def _inputs(model, n=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    given = {}
    if model.context_dim is not None:
        given["context"] = random(n, 7, model.context_dim)
    if model.adm_in_channels is not None:
        given["y"] = random(n, model.adm_in_channels)
    if model.num_classes is not None:
        given["y"] = torch.arange(n) % model.num_classes
    return random(n, model.in_channels, 8, 12), torch.tensor([0, 37, 999])[:n], given


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_plain_torch(variant):
    fused, plain = _build(variant), _build(variant, PlainGroupNorm)
    assert not any(isinstance(module, Conv2d) or type(module) is GroupNorm for module in plain.modules())
    x, timesteps, given = _inputs(fused)
    expected = plain(x, timesteps, **given)
    assert expected.std() > 0.1  # a network that answers nothing would agree with everything
    assert max_difference(fused(x, timesteps, **given), expected) <= 1e-5
    result = fused(x.to(memory_format=torch.channels_last), timesteps, **given)
    assert max_difference(result, expected) <= 1e-5
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_is_within_the_bound_of_winograd(variant, channels_last):
    fused, plain = _build(variant), _build(variant, PlainGroupNorm).double()
    x, timesteps, given = _inputs(fused)
    x = x.repeat(1, 1, 2, 2)
    of_plain = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
    with torch.no_grad():
        expected = plain(x.double(), timesteps, **of_plain)
        if channels_last:
            x, fused = x.to(memory_format=torch.channels_last), fused.to(memory_format=torch.channels_last)
        result = fused(x, timesteps, **given)
    assert result.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert (result - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_plain_torch_and_reach_everything(variant):
    grads = []
    for norm in (GroupNorm, PlainGroupNorm):
        model = _build(variant, norm).double().train()
        x, timesteps, given = _inputs(model, dtype=torch.float64)
        inputs = [tensor.requires_grad_() for tensor in (x, *given.values()) if tensor.is_floating_point()]
        loss = model(x, timesteps, **given).square().mean()
        grads.append(torch.autograd.grad(loss, [*inputs, *model.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        assert max_difference(ours, theirs) <= 1e-10
        assert ours.abs().max() > 1e-10


@pytest.mark.parametrize("variant", ["convolutions", "vectors"])
def test_it_learns(variant):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNetCondition(**{**SMALL, **VARIANTS[variant]})
    before = copy.deepcopy(model.state_dict())
    x, timesteps, given = _inputs(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = (model(x, timesteps, **given) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("vectors", [None, 10])
def test_is_unet_2d_condition_model_of_diffusers(linear, vectors):
    diffusers = import_peer("diffusers")
    of_ours, of_theirs = {}, {}
    if vectors is not None:
        of_ours = {"adm_in_channels": vectors}
        of_theirs = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": vectors}
    model = UNetCondition(
        4, 16, channel_mult=[1, 2, 2], attention_resolutions=[2, 4], transformer_depth=[0, 2, 1], context_dim=12,
        num_heads=2, use_linear_in_transformer=linear, num_groups=4, **of_ours,
    )  # fmt: skip
    randomize(model).eval()
    attended, plain = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
    peer = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=4,
        down_block_types=(plain[0], attended[0], attended[0]), up_block_types=(attended[1], attended[1], plain[1]),
        cross_attention_dim=12, attention_head_dim=2, transformer_layers_per_block=(1, 2, 1),
        use_linear_projection=linear, **of_theirs,
    ).eval()  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())
    copy_unet(model, peer)
    if vectors is not None:
        copy_parameters(model.vector_embedding[0], peer.class_embedding.linear_1)
        copy_parameters(model.vector_embedding[2], peer.class_embedding.linear_2)
    x, timesteps, given = _inputs(model)
    with torch.no_grad():
        expected = peer(x, timesteps, given["context"], class_labels=given.get("y")).sample
        assert expected.std() > 0.1
        assert max_difference(model(x, timesteps, **given), expected) <= 1e-5


def test_every_layer_is_a_fused_one():
    model = _build("vectors")
    blocks = [module for module in model.modules() if isinstance(module, ResBlock)]
    transformers = [module for module in model.modules() if isinstance(module, SpatialTransformer)]
    assert [len(t.transformer_blocks) for t in transformers] == [1, 3, 3, 3, 3, 1, 1]
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 2 * len(blocks) + len(transformers) + 1
    assert all(type(norm) is GroupNorm for norm in norms)
    assert {norm.eps for norm in norms} == {1e-5, 1e-6}
    assert not any(type(module) is nn.LayerNorm for module in model.modules())


def test_starts_at_zero():
    model = UNetCondition(**SMALL)
    x, timesteps, given = _inputs(model)
    assert torch.equal(model(x, timesteps, **given), torch.zeros_like(x))


def test_context_and_y_matter():
    for variant in VARIANTS:
        model = _build(variant)
        x, timesteps, given = _inputs(model)
        expected = model(x, timesteps, **given)
        for name, value in given.items():
            other = model(x, timesteps, **{**given, name: value.flip(0)})
            assert max_difference(other, expected) > 1e-3


def test_classes_and_the_null_class():
    model = _build("classes")
    x, timesteps, given = _inputs(model)
    assert model.null_label == 5
    null = torch.full((3,), model.null_label)
    expected = model(x, timesteps, given["context"], null)
    assert torch.equal(model(x, timesteps, given["context"]), expected)
    assert max_difference(model(x, timesteps, **given), expected) > 1e-3


def test_low_precision_runs_and_is_close():
    for variant in ("convolutions", "vectors"):
        model = _build(variant)
        x, timesteps, given = _inputs(model)
        expected = model(x, timesteps, **given)
        half = {name: value.bfloat16() for name, value in given.items()}
        with torch.no_grad():
            result = model.bfloat16()(x.bfloat16(), timesteps, **half)
        assert result.dtype == torch.bfloat16
        assert (result - expected).norm() <= 0.05 * expected.norm()


def test_autocast_is_close():
    model = _build("linear")
    x, timesteps, given = _inputs(model)
    expected = model(x, timesteps, **given)
    with torch.autocast("cpu", torch.bfloat16):
        result = model(x, timesteps, **given)
    assert (result - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_state_dict_pickle_deepcopy_file(variant, tmp_path):
    model = _build(variant)
    x, timesteps, given = _inputs(model)
    expected = model(x, timesteps, **given)
    twin = UNetCondition.from_config(model.config).eval()
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    model.save(tmp_path / "unet.safetensors")
    loaded = UNetCondition.load(tmp_path / "unet.safetensors")
    assert loaded.config == model.config
    for other in (twin, loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(x, timesteps, **given), expected)
    with pytest.raises(CheckpointError, match="the file holds a UNetCondition, not a UNet"):
        UNet.load(tmp_path / "unet.safetensors")


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_of_the_field_on_meta(name):
    options, parameters = SIZES[name]
    with torch.device("meta"):
        model = UNetCondition(**options)
        x, timesteps, given = (
            torch.empty(2, 4, 16, 16),
            torch.zeros(2),
            {"context": torch.empty(2, 7, model.context_dim)},
        )
        if model.adm_in_channels is not None:
            given["y"] = torch.empty(2, model.adm_in_channels)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == parameters
    output = model(x, timesteps, **given)
    assert output.is_meta and output.shape == x.shape


def test_print():
    text = repr(_build("vectors"))
    for part in ("SpatialTransformer(", "use_linear=True", "CrossAttention(", "GEGLU(", "vector_embedding"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_channels": 0}, r"UNetCondition: out_channels must be None or a positive integer, got 0"),
        ({"context_dim": 0}, r"context_dim must be None or a positive integer, got 0"),
        ({"adm_in_channels": 2.5}, r"adm_in_channels must be None or a positive integer, got 2.5"),
        ({"adm_in_channels": 4, "num_classes": 3}, r"num_classes must be None where adm_in_channels is given, got 3 and 4"),
        ({"transformer_depth": 0}, r"transformer_depth must be an integer, or one for each of 2 levels, positive where"),
        ({"transformer_depth": [1, 0]}, r"as in the middle, got \[1, 0\] and transformer_depth_middle=None"),
        ({"transformer_depth": [1]}, r"transformer_depth must be .*, got \[1\]"),
        ({"transformer_depth": [1.5, 1]}, r"transformer_depth must be .*, got \[1.5, 1\]"),
        ({"transformer_depth_middle": 0}, r"transformer_depth_middle must be None or a positive integer, got 0"),
        ({"num_heads": 3}, r"SpatialTransformer: num_heads must divide channels, got num_heads=3 and channels=32"),
        ({"channel_mult": []}, r"UNetCondition: channel_mult must be positive numbers"),
        ({"num_groups": 5}, r"num_groups must divide every width \[16, 32\], got num_groups=5"),
        ({"null_class": True}, r"null_class needs num_classes"),
    ],
)  # fmt: skip
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        UNetCondition(**{**SMALL, **options})


def test_bad_config():
    with pytest.raises(
        ValueError, match=r"UNetCondition.from_config: unknown keys \['learn_sigma', 'norm'\]; the known"
    ):
        UNetCondition.from_config({"learn_sigma": True, "norm": "batch"})


def test_bad_inputs():
    model = _build("vectors")
    x, timesteps, given = _inputs(model)
    context, y = given["context"], given["y"]
    wanted_context = r"UNetCondition: context must be \[N, L, context_dim\] = \[3, L, 12\], got"
    wanted_y = r"UNetCondition: y must be \[N, adm_in_channels\] = \[3, 10\] numbers, got"
    cases = [
        ((x[:, :3], timesteps, context, y), r"x must be \[N, 4, H, W\], got shape \(3, 3, 8, 12\)"),
        (
            (x[..., :6], timesteps, context, y),
            r"height and width of x must be divisible by 4, got shape \(3, 4, 8, 6\)",
        ),
        ((x, timesteps[:2], context, y), r"timesteps must be \[N\] = \[3\] or a scalar, got shape \(2,\)"),
        ((x, timesteps, None, y), rf"{wanted_context} None"),
        ((x, timesteps, context[0], y), rf"{wanted_context} shape \(7, 12\)"),
        ((x, timesteps, context[:2], y), rf"{wanted_context} shape \(2, 7, 12\)"),
        ((x, timesteps, context[..., :5], y), rf"{wanted_context} shape \(3, 7, 5\)"),
        ((x, timesteps, context), rf"{wanted_y} None"),
        ((x, timesteps, context, y[:, :9]), rf"{wanted_y} shape \(3, 9\) of torch.float32"),
        ((x, timesteps, context, y.long()), rf"{wanted_y} shape \(3, 10\) of torch.int64"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(ValueError, match=r"the model takes no context \(context_dim=None\), got shape \(3, 7, 12\)"):
        _build("no_context")(x, timesteps, context)
    with pytest.raises(ValueError, match=r"the model has no classes \(num_classes=None\), got y"):
        _build("linear")(x, timesteps, context, torch.zeros(3).long())
