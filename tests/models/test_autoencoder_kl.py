"""`AutoencoderKL`: against plain torch, against the state dicts of CompVis and of diffusers, and as a module."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

from fastgen.models import AutoencoderKL, DiagonalGaussian, load_state
from fastgen.nn import GroupNorm, PlainGroupNorm, ResBlock, SingleHeadAttention

from ..backends import import_peer
from ..modules import max_difference, randomize
from . import foreign_compvis_autoencoder as compvis

ROUNDING = 1e-12  # of the largest value: sums of some hundred terms, layer after layer
SMALL = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "num_groups": 4}
VARIANTS = {
    "default": {},
    "attention_at_levels": {"channel_mult": [2, 1, 3], "num_res_blocks": 2, "attention_resolutions": [2, 4]},
    "no_quant_conv": {"use_quant_conv": False, "latent_channels": 3, "mid_attention": False},
    "one_channel": {"in_channels": 1, "out_channels": 2, "z_channels": 5, "latent_channels": 2},
    "mean_alone": {"double_z": False},
}


def build(variant, norm=GroupNorm, **options):
    return randomize(AutoencoderKL(**{**SMALL, **VARIANTS[variant], **options}, norm=norm)).eval()


def image(model, dtype=torch.float32, size=(16, 24)):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, model.in_channels, *size, generator=generator, dtype=torch.float64).to(dtype)


def outputs(model, x):
    """Mean, log-variance and reconstruction of the mean."""
    result, posterior = model(x, sample_posterior=False)
    return posterior.mean, posterior.logvar, result


def relative(a, b):
    return max_difference(a, b) / b.abs().max().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_plain_torch(variant):
    fused, plain = build(variant), build(variant, PlainGroupNorm)
    x = image(fused)
    expected = outputs(plain, x)
    assert expected[0].std() > 0.1 and expected[2].std() > 0.1
    for given in (x, x.to(memory_format=torch.channels_last)):
        for ours, theirs in zip(outputs(fused, given), expected, strict=True):
            assert max_difference(ours, theirs) <= 2e-5
    with torch.no_grad():  # Winograd's convolutions
        exact = outputs(plain.double(), x.double())
        for ours, theirs in zip(outputs(fused, x), exact, strict=True):
            assert (ours - theirs).norm() <= 2e-5 * theirs.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_plain_torch(variant):
    grads = []
    for norm in (GroupNorm, PlainGroupNorm):
        model = build(variant, norm).double()
        x = image(model, torch.float64).requires_grad_()
        result, posterior = model(x, generator=torch.Generator().manual_seed(3))
        loss = result.square().mean() + 1e-3 * posterior.kl().mean()
        grads.append(torch.autograd.grad(loss, [x, *model.parameters()]))
    assert all(grad.abs().max() > 0 for grad in grads[0])
    for ours, theirs in zip(*grads, strict=True):
        assert max_difference(ours, theirs) <= 1e-10


def test_everything_is_fused_or_nothing():
    for norm in (GroupNorm, PlainGroupNorm):
        model = build("attention_at_levels", norm)
        blocks = sum(isinstance(module, ResBlock) for module in model.modules())
        attentions = sum(isinstance(module, SingleHeadAttention) for module in model.modules())
        norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
        assert (blocks, attentions) == (3 * 2 + 2 + 3 * 3 + 2, 2 * 2 + 1 + 2 * 3 + 1)
        assert len(norms) == 2 * blocks + attentions + 2 and all(type(module) is norm for module in norms)
    assert not any(type(module).__module__.startswith("fastgen.nn.conv2d") for module in model.modules())


COMPVIS = {
    "stable_diffusion": ({"mults": (1, 2, 4), "blocks": 2}, {"channel_mult": [1, 2, 4], "num_res_blocks": 2}),
    "attention_at_levels": (
        {"mults": (2, 1, 3), "attended": (1, 2), "inputs": 1, "outputs": 2},
        {"channel_mult": [2, 1, 3], "attention_resolutions": [2, 4], "in_channels": 1, "out_channels": 2},
    ),
    "embed_dim": ({"z": 5, "embed_dim": 3}, {"z_channels": 5, "latent_channels": 3}),
}


@pytest.mark.parametrize("size", [(16, 24), (19, 13)])
@pytest.mark.parametrize("name", COMPVIS)
def test_compvis(name, size):
    sizes, found = COMPVIS[name]
    port = randomize(compvis.AutoencoderKL(**sizes)).double().eval()
    state = port.state_dict()
    assert "loss.logvar" in state and "encoder.down.0.downsample.conv.weight" in state
    model = AutoencoderKL.from_state_dict(state)
    assert model.config.items() >= found.items()
    fresh = AutoencoderKL.from_config(model.config).double().eval()
    assert fresh.load_state_dict(state).missing_keys == []
    x = image(model, torch.float64, size)
    with torch.no_grad():
        mean, logvar = port.moments(x).chunk(2, 1)
        expected = port.decode(mean)
        assert mean.std() > 0.1 and expected.std() > 0.1
        for ours in (model, fresh):
            for result, theirs in zip(outputs(ours, x), (mean, logvar, expected), strict=True):
                assert relative(result, theirs) <= ROUNDING


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
DIFFUSERS = {
    "stable_diffusion": ({}, {}),
    "flux": (
        {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 6},
        {"use_quant_conv": False, "latent_channels": 6},
    ),
    "no_mid_attention": ({"mid_block_add_attention": False}, {"mid_attention": False}),
    "attention_at_levels": (
        {
            "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        },
        {"attention_resolutions": [2]},
    ),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers(name):
    diffusers = import_peer("diffusers")
    options, found = DIFFUSERS[name]
    sizes = {
        "block_out_channels": (16, 32, 48), "layers_per_block": 2, "norm_num_groups": 4,
        "down_block_types": 3 * ("DownEncoderBlock2D",), "up_block_types": 3 * ("UpDecoderBlock2D",),
    }  # fmt: skip
    peer = randomize(diffusers.AutoencoderKL(**{**sizes, **options})).double().eval()
    state = peer.state_dict()
    old = {re.sub("|".join(OLD_NAMES), lambda match: OLD_NAMES[match[0]], key): value for key, value in state.items()}
    assert (old.keys() == state.keys()) == (name == "no_mid_attention")
    model = AutoencoderKL.from_state_dict(state, num_groups=4, scaling_factor=0.3611)
    assert model.config.items() >= {"channel_mult": [1, 2, 3], "scaling_factor": 0.3611, **found}.items()
    fresh = AutoencoderKL.from_config(model.config).double().eval()
    fresh.load_state_dict(old)
    x = image(model, torch.float64, (20, 15))
    with torch.no_grad():
        theirs = peer.encode(x).latent_dist
        expected = (theirs.mean, theirs.logvar, peer.decode(theirs.mean).sample)
        assert expected[0].std() > 0.1 and expected[2].std() > 0.1
        for ours in (model, fresh):
            for result, wanted in zip(outputs(ours, x), expected, strict=True):
                assert relative(result, wanted) <= ROUNDING
        draws = (posterior.sample(torch.Generator().manual_seed(5)) for posterior in (model.encode(x), theirs))
        assert relative(*draws) <= ROUNDING
        assert relative(model.encode(x).kl(), theirs.kl()) <= ROUNDING


def test_inside_another_module():
    port = randomize(compvis.AutoencoderKL()).double().eval()
    model = AutoencoderKL.from_state_dict(port.state_dict())
    outer = nn.ModuleDict({"first_stage_model": AutoencoderKL.from_config(model.config).double()})
    outer.load_state_dict({f"first_stage_model.{key}": value for key, value in port.state_dict().items()})
    x = image(model, torch.float64)
    assert torch.equal(outer["first_stage_model"].encode(x).mean, model.encode(x).mean)


def test_what_is_missing_is_named():
    state = randomize(compvis.AutoencoderKL()).state_dict()
    model = AutoencoderKL.from_state_dict(state)
    del state["encoder.mid.attn_1.q.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "encoder.mid.attn.0.q.bias"'):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match=r"not the weights of such a model: no 'encoder.conv_in.weight'"):
        AutoencoderKL.from_state_dict({"weight": torch.zeros(1)})


def test_the_gaussian():
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    posterior, other = DiagonalGaussian(mean, logvar), DiagonalGaussian(0.5 * logvar, mean)
    normals = [Independent(Normal(p.mean, p.std), 3) for p in (posterior, other)]
    standard = Independent(Normal(torch.zeros_like(mean), 1.0), 3)
    assert relative(posterior.kl(), kl_divergence(normals[0], standard)) <= ROUNDING
    assert relative(posterior.kl(other), kl_divergence(*normals)) <= ROUNDING
    assert relative(posterior.var, posterior.std**2) <= ROUNDING
    assert torch.equal(posterior.mode(), mean)
    clamped = DiagonalGaussian(mean, 100 * logvar).logvar
    assert clamped.min() == -30 and clamped.max() == 20
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(posterior.sample(torch.Generator().manual_seed(1)), mean + posterior.std * noise)
    seeds = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
    alone = DiagonalGaussian(mean[1:2], logvar[1:2]).sample(torch.Generator().manual_seed(5))
    assert torch.equal(posterior.sample(seeds)[1:2], alone)


def test_the_mean_alone_has_hardly_a_variance():
    model = build("mean_alone")
    posterior = model.encode(image(model))
    assert (posterior.sample() - posterior.mode()).abs().max() <= 1e-5
    assert posterior.kl().shape == (2,)


def test_forward_is_decode_of_encode():
    model = build("default")
    x = image(model)
    result, posterior = model(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(result, model.decode(posterior.sample(torch.Generator().manual_seed(1))))
    assert not torch.equal(result, model(x, sample_posterior=False)[0])


def test_sizes():
    model = build("attention_at_levels")
    assert model.downsampling == 4
    assert model(image(model)[:0])[0].shape == (0, 3, 16, 24)
    for size, latent in (((16, 24), (4, 6)), ((19, 13), (4, 3)), ((4, 4), (1, 1))):
        assert model.encode(image(model, size=size)).mean.shape == (2, 4, *latent)
        assert model(image(model, size=size))[0].shape == (2, 3, 4 * latent[0], 4 * latent[1])


def test_channels_last_weights_make_an_image_of_one_channel_channels_last():
    model = build("one_channel").to(memory_format=torch.channels_last)
    layouts = []
    for module in model.modules():
        if isinstance(module, ResBlock):
            module.register_forward_hook(
                lambda module, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
            )
    with torch.no_grad():
        model(image(model))
    assert len(layouts) > 6 and all(layouts)


def test_low_precision_runs_and_is_close():
    model = build("attention_at_levels")
    x = image(model)
    with torch.no_grad():
        expected = outputs(model, x)
        result = outputs(model.bfloat16(), x.bfloat16())
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_state_dict_files_pickle_deepcopy(variant, tmp_path):
    model = build(variant)
    x = image(model)
    expected = outputs(model, x)
    twin = AutoencoderKL.from_config(model.config).eval()
    assert twin.config == model.config and twin.scaling_factor == 0.18215
    twin.load_state_dict(model.state_dict())
    found = AutoencoderKL.from_state_dict(model.state_dict(), num_groups=4)
    assert found.config == model.config
    model.save(tmp_path / "vae.safetensors")
    assert load_state(tmp_path / "vae.safetensors")[0].keys() == model.state_dict().keys()
    loaded = AutoencoderKL.load(tmp_path / "vae.safetensors")
    for other in (twin, found, loaded, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert all(torch.equal(*pair) for pair in zip(outputs(other, x), expected, strict=True))


def test_meta_construction_and_forward():
    with torch.device("meta"):
        model = AutoencoderKL()
    assert sum(p.numel() for p in model.parameters()) == 83_653_863  # Stable Diffusion's
    result, posterior = model(torch.empty(2, 3, 64, 64, device="meta"), sample_posterior=False)
    assert result.is_meta and result.shape == (2, 3, 64, 64) and posterior.mean.shape == (2, 4, 8, 8)


def test_print():
    text = repr(build("default"))
    for part in ("SingleHeadAttention(\n", "activation='silu'", "use_conv=True, padding=0", "UpsampleConv2d("):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, r"in_channels must be a positive integer, got 0"),
        ({"latent_channels": 1.5}, r"latent_channels must be a positive integer, got 1.5"),
        ({"z_channels": -1}, r"z_channels must be None or a positive integer, got -1"),
        ({"channel_mult": [0.3]}, r"channel_mult must be .*, got \[0.3\]"),
        ({"attention_resolutions": [4]}, r"attention_resolutions must be .* among \[1, 2\], got \[4\]"),
        ({"num_groups": 5}, r"num_groups must divide every width \[16, 32\], got num_groups=5"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"use_quant_conv": False, "z_channels": 3}, r"z_channels must be latent_channels .*, got z_channels=3 and"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKL(**{**SMALL, **options})


def test_bad_inputs():
    model = build("attention_at_levels")
    x = image(model)
    wanted = r"x must be \[N, 3, H, W\] with H and W at least 4, got shape"
    for bad, shape in ((x[0], r"\(3, 16, 24\)"), (x[:, :2], r"\(2, 2, 16, 24\)"), (x[..., :3], r"\(2, 3, 16, 3\)")):
        with pytest.raises(ValueError, match=f"{wanted} {shape}"):
            model.encode(bad)
    for bad in (torch.zeros(2, 3, 4, 4), torch.zeros(4, 4, 4), torch.zeros(2, 4, 0, 4)):
        shape = re.escape(str(tuple(bad.shape)))
        with pytest.raises(ValueError, match=rf"z must be \[N, 4, h, w\], got shape {shape}"):
            model.decode(bad)
