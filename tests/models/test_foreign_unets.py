"""State dicts of guided-diffusion's U-Nets, and of those of latent-diffusion, Stable Diffusion and sgm: each loads unchanged, tells
its sizes, and is the same function, in float64 to rounding."""

import pytest
import torch
from torch import nn

from fastgen.models import UNet, UNetCondition
from fastgen.nn import PlainGroupNorm, SpatialAttention

from ..modules import max_difference, randomize
from . import foreign_guided_diffusion as guided
from . import foreign_latent_diffusion as latent

ROUNDING = 1e-12  # of the largest value: sums of at most some thousand terms, layer after layer
# what the foreign class takes, then what the state must tell and what has to be told
GUIDED = {
    "improved": ({"outputs": 3, "heads": 4}, {"num_heads": 4}),
    "updown": (
        {
            "outputs": 6,
            "heads": 2,
            "mults": (1, 2, 2),
            "blocks": 2,
            "attended": (1, 2),
            "classes": 7,
            "scale_shift": True,
            "updown": True,
        },
        {"num_heads": 2},
    ),
    "fractions": (
        {"outputs": 6, "width": 64, "channels": 16, "mults": (0.5, 1, 1), "updown": True},
        {"num_head_channels": 16},
    ),
    "new_order": (
        {"outputs": 3, "channels": 8, "mults": (1, 1), "blocks": 3, "attended": (0, 1), "new_order": True},
        {"num_head_channels": 8, "use_new_attention_order": True},
    ),
    "means": ({"outputs": 3, "heads": 1, "mults": (1, 1, 2), "blocks": 2, "conv_resample": False}, {"num_heads": 1}),
    "one_level": ({"outputs": 3, "heads": 2, "mults": (1,), "blocks": 2, "attended": (0,)}, {"num_heads": 2}),
    "flat_updown": (
        {"outputs": 3, "heads": 2, "mults": (1, 1, 1), "blocks": 2, "attended": (), "updown": True},
        {"num_heads": 2},
    ),
}
LATENT = {
    "sd1": (
        {"heads": 8, "mults": (1, 2, 4, 4), "blocks": 2, "attended": (0, 1, 2), "context": 24},
        {"num_heads": 8},
        {"transformer_depth": [1, 1, 1, 0], "transformer_depth_middle": 1, "context_dim": 24},
    ),
    "inpainting": (
        {"inputs": 9, "heads": 4, "attended": (0, 1), "context": 24, "depths": (2, 2)},
        {"num_heads": 4},
        {"in_channels": 9, "out_channels": 4, "transformer_depth": [2, 2]},
    ),
    "sd2": (
        {"channels": 16, "mults": (1, 2, 4), "blocks": 2, "attended": (0, 1), "context": 24, "linear": True},
        {"num_head_channels": 16},
        {"use_linear_in_transformer": True},
    ),
    "sdxl": (
        {
            "channels": 16,
            "mults": (1, 2, 4),
            "attended": (1, 2),
            "context": 24,
            "linear": True,
            "depths": (0, 2, 4),
            "adm": 20,
        },
        {"num_head_channels": 16},
        {"transformer_depth": [0, 2, 4], "transformer_depth_middle": 4, "adm_in_channels": 20, "num_classes": None},
    ),
    "refiner": (
        {
            "channels": 16,
            "mults": (1, 2, 2),
            "attended": (1,),
            "context": 24,
            "linear": True,
            "depths": (2, 2, 2),
            "adm": 20,
        },
        {"num_head_channels": 16},
        {"transformer_depth": [0, 2, 0], "transformer_depth_middle": 2, "adm_in_channels": 20},
    ),
    "classes": (
        {"heads": 2, "attended": (1,), "context": 32, "classes": 5, "scale_shift": True, "updown": True},
        {"num_heads": 2},
        {"num_classes": 5, "resblock_updown": True, "use_scale_shift_norm": True},
    ),
}


def _heads(c, heads=None, channels=None):
    return heads or c // channels


def _port(attention, inputs, width, outputs, mults=(1, 2), attended=(1,), classes=None, adm=None, **options):
    label_emb = None
    if classes is not None:
        label_emb = nn.Embedding(classes, 4 * width)
    elif adm is not None:
        label_emb = latent.vector_embedding(adm, 4 * width)
    port = guided.UNetModel(
        inputs, width, outputs, attention, mults=mults, attended=attended, label_emb=label_emb, **options
    )
    return randomize(port).double().eval()


def _guided(name):
    options = {"inputs": 3, "width": 32, "heads": None, "channels": None, "new_order": False, **GUIDED[name][0]}
    heads, channels, new_order = (options.pop(key) for key in ("heads", "channels", "new_order"))
    port = _port(lambda c, level: guided.AttentionBlock(c, _heads(c, heads, channels), new_order), **options)
    return port, GUIDED[name][1]


def _latent(name):
    sizes = {"inputs": 4, "width": 32, "outputs": 4, "heads": None, "channels": None, "linear": False, "depths": None}
    options = {**sizes, **LATENT[name][0]}
    heads, channels, context, linear, depths = (
        options.pop(key) for key in ("heads", "channels", "context", "linear", "depths")
    )

    def attention(c, level):
        depth = 1 if depths is None else depths[-1 if level is None else level]
        return latent.SpatialTransformer(c, context, _heads(c, heads, channels), depth, linear)

    return _port(attention, **options), *LATENT[name][1:]


def _inputs(port, n=2, context=None):
    generator = torch.Generator().manual_seed(2)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given = {}
    if isinstance(port.label_emb, nn.Embedding):
        given["y"] = torch.arange(n) + port.label_emb.num_embeddings - n
    elif port.label_emb is not None:
        given["y"] = random(n, port.label_emb[0][0].in_features)
    if context is not None:
        given["context"] = random(n, 7, context)
    timesteps = torch.tensor([3.0, 871.0], dtype=torch.float64)
    return random(n, port.input_blocks[0][0].in_channels, 8, 16), timesteps, given


def _assert_same(model, port, x, timesteps, given):
    with torch.no_grad():
        expected = port(x, timesteps, **given)
        assert expected.std() > 0.1
        for image in (x, x.to(memory_format=torch.channels_last)):
            assert max_difference(model(image, timesteps, **given), expected) <= ROUNDING * expected.abs().max()


@pytest.mark.parametrize("name", GUIDED)
def test_guided_diffusion(name):
    port, told = _guided(name)
    state = port.state_dict()
    model = UNet.from_state_dict(state, **told)
    options = GUIDED[name][0]
    assert (
        model.config.items()
        >= {
            "in_channels": 3,
            "model_channels": options.get("width", 32),
            "channel_mult": list(options.get("mults", (1, 2))),
            "num_res_blocks": options.get("blocks", 1),
            "attention_resolutions": [2**level for level in options.get("attended", (1,))],
            "num_classes": options.get("classes"),
            "use_scale_shift_norm": options.get("scale_shift", False),
            "resblock_updown": options.get("updown", False),
            "learn_sigma": options["outputs"] == 6,
        }.items()
    )
    assert model.config.get("conv_resample", True) == options.get("conv_resample", True)
    assert not model.training and next(model.parameters()).dtype == torch.float64
    _assert_same(model, port, *_inputs(port))
    in_order = {"use_new_attention_order": True} if "new_order" in options else {}
    fresh = UNet.from_config(model.config, norm=PlainGroupNorm, **in_order).double().eval()
    assert fresh.load_state_dict({f"module.{key}": tensor for key, tensor in state.items()}).missing_keys == []
    _assert_same(fresh, port, *_inputs(port))


@pytest.mark.parametrize("name", LATENT)
def test_latent_diffusion(name):
    port, told, sizes = _latent(name)
    options = LATENT[name][0]
    checkpoint = {f"model.diffusion_model.{key}": tensor for key, tensor in port.state_dict().items()}
    state = {key.removeprefix("model.diffusion_model."): tensor for key, tensor in checkpoint.items()}
    model = UNetCondition.from_state_dict(state, **told)
    assert (
        model.config.items()
        >= {
            "model_channels": 32,
            "channel_mult": list(options.get("mults", (1, 2))),
            "num_res_blocks": options.get("blocks", 1),
            "attention_resolutions": [2**level for level in options["attended"]],
            "context_dim": options["context"],
            "use_linear_in_transformer": options.get("linear", False),
            **sizes,
        }.items()
    )
    inputs = _inputs(port, context=options["context"])
    _assert_same(model, port, *inputs)
    fresh = UNetCondition.from_config(model.config, norm=PlainGroupNorm).double().eval()
    assert fresh.load_state_dict(state).missing_keys == []
    _assert_same(fresh, port, *inputs)


def test_either_form_of_the_projections_loads_the_other():
    for name in ("sd1", "sd2"):
        port, told, _ = _latent(name)
        other = not LATENT[name][0].get("linear", False)
        model = UNetCondition.from_state_dict(port.state_dict(), **told, use_linear_in_transformer=other)
        assert model.config["use_linear_in_transformer"] == other
        _assert_same(model, port, *_inputs(port, context=24))


def test_unconditional_latent_diffusion_is_guided_diffusion():
    port, told = _guided("improved")
    with pytest.raises(
        ValueError, match=r"UNetCondition\.from_state_dict: not the weights of such a model: no 'middle_"
    ):
        UNetCondition.from_state_dict(port.state_dict(), **told)


@pytest.mark.parametrize("name", ["improved", "new_order"])
def test_the_order_of_heads_is_that_which_is_said(name):
    port, told = _guided(name)
    new = "use_new_attention_order" in told
    x, timesteps, _ = _inputs(port)
    model = UNet.from_state_dict(port.state_dict(), **told)
    wrong = UNet.from_state_dict(port.state_dict(), **{**told, "use_new_attention_order": not new})
    with torch.no_grad():
        expected = model(x, timesteps)
        assert max_difference(wrong(x, timesteps), expected) > 1e-3
        alone = UNet.from_config(model.config).double().eval()
        alone.load_state_dict(port.state_dict())  # nothing said: the old order
        assert torch.equal(alone(x, timesteps), (wrong if new else model)(x, timesteps))
        # our own weights are in our order, whatever is said
        for said in (False, True):
            again = UNet.from_config(model.config, use_new_attention_order=said).double().eval()
            again.load_state_dict(model.state_dict())
            assert torch.equal(again(x, timesteps), expected)
            again = UNet.from_state_dict(model.state_dict(), **{**told, "use_new_attention_order": said})
            assert torch.equal(again(x, timesteps), expected)


def test_rows_of_several_heads():
    model = UNet(1, 32, channel_mult=[1], num_res_blocks=1, attention_resolutions=[], num_heads=2)
    name = next(name for name, module in model.named_modules() if isinstance(module, SpatialAttention))
    port = guided.UNetModel(1, 32, 1, lambda c, level: guided.AttentionBlock(c, 2), mults=(1,), attended=())
    state = port.state_dict()
    state[f"{name}.qkv.bias"] = torch.arange(96.0)
    state[f"{name}.qkv.weight"] = torch.arange(96.0)[:, None, None].expand(96, 32, 1)
    model.load_state_dict(state)
    rows = [start + row for start in (0, 48, 16, 64, 32, 80) for row in range(16)]  # q, k and v, each of two heads
    qkv = model.get_submodule(name).qkv
    assert qkv.bias.tolist() == rows and qkv.weight[:, 3].tolist() == rows


@pytest.mark.parametrize("build", [_guided, _latent])
def test_own_weights_tell_the_sizes(build):
    for name in GUIDED if build is _guided else LATENT:
        port, told, *_ = build(name)
        model = (UNet if build is _guided else UNetCondition).from_state_dict(port.state_dict(), **told)
        again = type(model).from_state_dict(model.state_dict(), **told)
        assert again.config == model.config
        for ours, theirs in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()


def test_what_shapes_do_not_tell_is_an_option():
    options = {"num_classes": 3, "null_class": True, "num_groups": 4, "dropout": 0.5, "num_heads": 2}
    model = randomize(UNet(2, 16, channel_mult=[1, 2], num_res_blocks=1, **options))
    again = UNet.from_state_dict(model.state_dict(), **options, norm=PlainGroupNorm)
    assert again.config == model.config and isinstance(again.out_norm, PlainGroupNorm)
    assert all(p.requires_grad for p in again.parameters())
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    assert {tensor.dtype for tensor in UNet.from_state_dict(half, **options).state_dict().values()} == {torch.float16}


@pytest.mark.parametrize(("cls", "build"), [(UNet, _guided), (UNetCondition, _latent)])
def test_what_does_not_fit_is_named(cls, build):
    name = "updown" if build is _guided else "sd2"
    port, told, *_ = build(name)
    state = port.state_dict()
    with pytest.raises(
        ValueError, match=rf"{cls.__name__}\.from_state_dict: num_heads or num_head_channels must be given"
    ):
        cls.from_state_dict(state)
    with pytest.raises(
        ValueError, match=r"from_state_dict: not the weights of such a model: no 'input_blocks.0.0.weight'"
    ):
        cls.from_state_dict({f"model.diffusion_model.{key}": tensor for key, tensor in state.items()}, **told)
    with pytest.raises(ValueError, match=r"unknown keys \['heads'\]"):
        cls.from_state_dict(state, **told, heads=3)
    without = {key: tensor for key, tensor in state.items() if key != "input_blocks.1.0.in_layers.0.bias"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "input_blocks.1.0.norm1.bias"'):
        cls.from_state_dict(without, **told)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "id_predictor.0.weight"'):
        cls.from_state_dict({**state, "id_predictor.0.weight": torch.zeros(1)}, **told)
    with pytest.raises(RuntimeError, match=r"size mismatch for input_blocks.0.0.weight"):
        cls.from_state_dict(state, **told, in_channels=1)
    flat = {key: tensor.flatten(2) if tensor.dim() == 4 else tensor for key, tensor in state.items()}
    with pytest.raises(
        ValueError, match=r"convolutions must be of 2 dimensions, got a weight of shape \(32, [34], 9\)"
    ):
        cls.from_state_dict(flat, **told)


def test_an_output_that_is_no_image_nor_two():
    port, told = _guided("improved")
    state = port.state_dict()
    state["out.2.weight"], state["out.2.bias"] = state["out.2.weight"][:2], state["out.2.bias"][:2]
    with pytest.raises(
        ValueError, match=r"the output must have the channels of the input, or twice as many, got 2 and 3"
    ):
        UNet.from_state_dict(state, **told)


def test_a_model_inside_another_module():
    port, told = _guided("improved")
    model = UNet.from_state_dict(port.state_dict(), **told)
    outer = nn.ModuleDict({"unet": UNet.from_config(model.config).double().eval()})
    outer.load_state_dict({f"unet.{key}": tensor for key, tensor in port.state_dict().items()})
    x, timesteps, _ = _inputs(port)
    with torch.no_grad():
        assert torch.equal(outer["unet"](x, timesteps), model(x, timesteps))
