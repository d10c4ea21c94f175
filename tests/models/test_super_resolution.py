"""`SuperResolutionUNet`: against the `UNet` it is, against guided-diffusion's state dicts, and as a module."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastgen.models import SuperResolutionUNet, UNet
from fastgen.nn import GroupNorm, PlainGroupNorm

from ..modules import max_difference, randomize
from . import foreign_guided_diffusion as guided

ROUNDING = 1e-12  # of the largest value
SMALL = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "num_groups": 4}
VARIANTS = {
    "default": {},
    "classes_and_noise": {
        "in_channels": 1,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "num_classes": 5,
        "null_class": True,
        "noise_conditioning": True,
    },
    "other_channels": {"in_channels": 2, "low_res_channels": 1, "learn_sigma": True, "noise_conditioning": True},
}


def build(variant, norm=GroupNorm):
    return randomize(SuperResolutionUNet(**{**SMALL, **VARIANTS[variant]}, norm=norm)).eval()


def arguments(model, dtype=torch.float32, n=3):
    """As keywords."""
    generator = torch.Generator().manual_seed(1)
    x, low_res = (
        torch.randn(n, channels, *size, generator=generator, dtype=torch.float64).to(dtype)
        for channels, size in ((model.in_channels, (8, 12)), (model.low_res_channels, (3, 5)))
    )
    given = {"x": x, "timesteps": torch.tensor([0.0, 37.0, 999.0], dtype=dtype), "low_res": low_res}
    if model.num_classes is not None:
        given["y"] = torch.arange(n)
    if model.low_res_embedding is not None:
        given["low_res_level"] = torch.tensor([0.0, 0.1, 0.7], dtype=dtype)
    return given


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_plain_torch(variant):
    fused, plain = build(variant), build(variant, PlainGroupNorm)
    given = arguments(fused)
    expected = plain(**given)
    assert expected.std() > 0.1 and expected.shape == (3, fused.out_channels, 8, 12)
    assert max_difference(fused(**given), expected) <= 1e-5
    last = {
        name: value.to(memory_format=torch.channels_last) if value.dim() == 4 else value
        for name, value in given.items()
    }
    assert max_difference(fused(**last), expected) <= 1e-5
    with torch.no_grad():  # Winograd's convolutions
        exact = plain.double()(**arguments(fused, torch.float64))
        assert (fused(**given) - exact).norm() <= 2e-5 * exact.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_plain_torch(variant):
    grads = []
    for norm in (GroupNorm, PlainGroupNorm):
        model = build(variant, norm).double()
        given = arguments(model, torch.float64)
        leaves = [given["x"].requires_grad_(), given["low_res"].requires_grad_(), *model.parameters()]
        grads.append(torch.autograd.grad(model(**given).square().mean(), leaves))
    assert all(grad.abs().max() > 0 for grad in grads[0])
    for ours, theirs in zip(*grads, strict=True):
        assert max_difference(ours, theirs) <= 1e-10


def test_is_a_unet_of_both_images():
    """Whose first convolution sees twice the channels, and whose output is its first half."""
    model = build("default").double()
    both = UNet(in_channels=6, **SMALL).double().eval()
    state = model.state_dict()
    for name in ("out_conv.weight", "out_conv.bias"):
        state[name] = torch.cat([state[name], torch.zeros_like(state[name])])
    both.load_state_dict(state)
    given = arguments(model, torch.float64)
    upsampled = F.interpolate(given["low_res"], size=(8, 12), mode="bilinear", align_corners=False)
    expected = both(torch.cat([given["x"], upsampled], 1), given["timesteps"])[:, :3]
    assert max_difference(model(**given), expected) <= 1e-12
    assert max_difference(model(**{**given, "low_res": upsampled}), expected) <= 1e-12
    assert isinstance(model, UNet)


GUIDED = {
    "plain": ({"inputs": 6, "outputs": 3}, {"num_heads": 2}, {"in_channels": 3, "low_res_channels": None}),
    "released": (
        {"inputs": 2, "outputs": 2, "scale_shift": True, "updown": True},
        {"num_head_channels": 16, "num_classes": 4},
        {"in_channels": 1, "low_res_channels": None, "learn_sigma": True, "num_classes": 4},
    ),
    "other_channels": ({"inputs": 4, "outputs": 3}, {"num_heads": 2}, {"in_channels": 3, "low_res_channels": 1}),
    "other_and_sigma": (
        {"inputs": 4, "outputs": 6},
        {"num_heads": 2},
        {"in_channels": 3, "low_res_channels": 1, "learn_sigma": True},
    ),
}


@pytest.mark.parametrize("name", GUIDED)
def test_guided_diffusion(name):
    sizes, options, found = GUIDED[name]
    sizes, y = dict(sizes), None
    if "num_classes" in options:
        sizes["label_emb"], y = torch.nn.Embedding(4, 128), torch.tensor([3, 1])
    port = guided.UNetModel(
        width=32, attention=lambda c, level: guided.AttentionBlock(c, options.get("num_heads", c // 16)), **sizes
    )
    randomize(port).double().eval()
    model = SuperResolutionUNet.from_state_dict(port.state_dict(), **options)
    assert model.config.items() >= {**found, "noise_conditioning": False}.items()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, model.in_channels, 8, 12, generator=generator, dtype=torch.float64)
    low_res = torch.randn(2, model.low_res_channels, 3, 5, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([3.0, 500.0], dtype=torch.float64)
    upsampled = F.interpolate(low_res, (8, 12), mode="bilinear")
    with torch.no_grad():
        expected = port(torch.cat([x, upsampled], 1), timesteps, y=y)
        result = model(x, timesteps, low_res, y)
    assert expected.std() > 0.1 and max_difference(result, expected) <= ROUNDING * expected.abs().max()


def test_the_level_of_the_noise():
    model = build("classes_and_noise")
    given = arguments(model)
    one = {name: value[:1].expand(3, *value.shape[1:]) for name, value in given.items() if name != "low_res_level"}
    outputs = model(**one, low_res_level=given["low_res_level"])
    assert max_difference(outputs[0], outputs[1]) > 1e-3
    all_alike = model(**one, low_res_level=torch.tensor(0.1))
    assert torch.equal(all_alike, model(**one, low_res_level=torch.full((3,), 0.1)))
    as_timestep = model.low_res_embedding(torch.tensor([100.0]))
    seen = []
    model.low_res_embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(**one, low_res_level=torch.tensor(0.1))
    assert max_difference(seen[0][:1], as_timestep) <= 1e-5


def test_augment():
    generator = torch.Generator().manual_seed(0)
    low_res, noise = torch.randn(2, 3, 2, 4, 5, generator=generator)
    level = torch.tensor([0.0, 0.6, 1.0])
    result = SuperResolutionUNet.augment(low_res, level, noise)
    assert torch.equal(result[0], low_res[0]) and torch.equal(result[2], noise[2])
    assert max_difference(result[1], 0.8 * low_res[1] + 0.6 * noise[1]) <= 1e-6
    assert torch.equal(SuperResolutionUNet.augment(low_res, level[1], noise)[1], result[1])
    assert SuperResolutionUNet.augment(low_res.bfloat16(), level, noise.bfloat16()).dtype == torch.bfloat16


def test_starts_at_zero():
    model = SuperResolutionUNet(**SMALL)
    given = arguments(model)
    assert torch.equal(model(**given), torch.zeros_like(given["x"]))


def test_an_empty_batch():
    model = build("classes_and_noise")
    assert model(**{name: value[:0] for name, value in arguments(model).items()}).shape == (0, 1, 8, 12)


def test_low_precision_runs_and_is_close():
    model = build("default")
    given = arguments(model)
    expected = model(**given)
    result = model.bfloat16()(given["x"].bfloat16(), given["timesteps"], given["low_res"].bfloat16())
    assert result.dtype == torch.bfloat16
    assert (result - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_state_dict_files_pickle_deepcopy(variant, tmp_path):
    model = build(variant)
    given = arguments(model)
    expected = model(**given)
    twin = SuperResolutionUNet.from_config(model.config).eval()
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    model.save(tmp_path / "unet.safetensors")
    loaded = SuperResolutionUNet.load(tmp_path / "unet.safetensors")
    found = SuperResolutionUNet.from_state_dict(
        model.state_dict(), num_heads=1, num_groups=4,
        **{name: model.config[name] for name in ("num_classes", "null_class")},
    )  # fmt: skip
    assert found.config == model.config
    for other in (twin, loaded, found, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(**given), expected)
    assert type(SuperResolutionUNet.load(tmp_path / "unet.safetensors", norm=PlainGroupNorm).out_norm) is PlainGroupNorm


def test_meta_construction_and_forward():
    with torch.device("meta"):
        model = SuperResolutionUNet(3, 64, noise_conditioning=True)
        given = {"timesteps": torch.zeros(2), "low_res": torch.empty(2, 3, 8, 8), "low_res_level": torch.zeros(2)}
        output = model(torch.empty(2, 3, 32, 32), **given)
    assert all(p.is_meta for p in model.parameters())
    assert output.is_meta and output.shape == (2, 3, 32, 32)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"low_res_channels must be None or a positive integer, got 0"):
        SuperResolutionUNet(low_res_channels=0, **SMALL)
    with pytest.raises(ValueError, match=r"SuperResolutionUNet: num_groups must divide every width"):
        SuperResolutionUNet(**{**SMALL, "num_groups": 5})
    with pytest.raises(TypeError, match="depth"):
        SuperResolutionUNet(depth=3)
    with pytest.raises(ValueError, match=r"unknown keys \['depth'\]; the known ones are \['in_channels', .*'dropout'"):
        SuperResolutionUNet.from_config({"depth": 3})


def test_bad_inputs():
    model = build("classes_and_noise")
    given = arguments(model)
    low_res = given["low_res"]
    wanted = r"low_res must be \[3, 1, h, w\], got shape"
    for change, message in (
        ({"x": given["x"][:, 0]}, r"SuperResolutionUNet: x must be \[N, 1, H, W\], got shape \(3, 8, 12\)"),
        ({"low_res": low_res[:2]}, rf"{wanted} \(2, 1, 3, 5\)"),
        ({"low_res": low_res[:, 0]}, rf"{wanted} \(3, 3, 5\)"),
        ({"low_res": low_res[:, :0]}, rf"{wanted} \(3, 0, 3, 5\)"),
        ({"low_res": low_res[..., :0]}, rf"{wanted} \(3, 1, 3, 0\)"),
        ({"low_res_level": None}, r"low_res_level is needed, the model has noise_conditioning"),
        ({"low_res_level": torch.zeros(2)}, r"low_res_level must be \[N\] = \[3\] or a scalar, got shape \(2,\)"),
        ({"timesteps": torch.zeros(2)}, r"timesteps must be \[N\] = \[3\] or a scalar, got shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**given, **change})
    plain = build("default")
    with pytest.raises(ValueError, match=r"the model has no noise_conditioning, got low_res_level"):
        plain(**arguments(plain), low_res_level=torch.tensor(0.5))
