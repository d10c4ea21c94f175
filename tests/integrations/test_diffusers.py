"""diffusers' own models and pipelines accelerated: U-Nets, autoencoders, schedulers, attention processors that users set, LoRA."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen
from fastgen import _library
from fastgen.integrations import fusing
from fastgen.integrations.diffusers import PROCESSORS
from fastgen.integrations.stand_in import mixin_of

from ..backends import import_peer
from ..modules import randomize
from .numerics import WINOGRAD, assert_accelerated, error

diffusers = import_peer("diffusers")
STEPS = torch.tensor([3, 500])
SMALL = {"sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
UNETS = {
    "attention": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    },
    "scale and shift, resampling in blocks": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "skips of score-based models": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (32, 64),
    },
}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("name", UNETS)
def test_unet_2d(name):
    model = randomize(diffusers.UNet2DModel(**SMALL | UNETS[name]))
    x = randn(2, 3, 16, 16)
    call = lambda m, dtype: m(x.to(dtype), STEPS).sample  # noqa: E731
    assert_accelerated(model, call, ("Conv2d", "GroupNorm", "ResnetBlock2D", "Attention"))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_unet_2d_condition(masked, linear, channels_last):
    model = randomize(
        diffusers.UNet2DConditionModel(
            **SMALL,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=4,
            use_linear_projection=linear,
        )
    )
    x, context = randn(2, 4, 16, 16), randn(2, 7, 24)
    if channels_last:
        model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]) if masked else None
    call = lambda m, dtype: m(x.to(dtype), STEPS, context.to(dtype), encoder_attention_mask=mask).sample  # noqa: E731
    expected = ("Conv2d", "GroupNorm", "ResnetBlock2D", "Attention", "BasicTransformerBlock", "Transformer2DModel")
    assert_accelerated(model, call, expected)


def unet_and_layouts(monkeypatch, dtypes):
    """One that is accelerated, where ``dtypes`` are faster channels-last, and the layouts that its first convolution is given."""
    monkeypatch.setattr(fusing, "CHANNELS_LAST", {_library.ISA: {"UNet2DModel": frozenset(dtypes)}})
    model = randomize(diffusers.UNet2DModel(**SMALL | UNETS["attention"])).eval()
    layouts: list[bool] = []
    model.conv_in.register_forward_pre_hook(
        lambda module, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    return model, layouts


@pytest.mark.skipif(_library.ISA is None, reason="no kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_u_net_is_channels_last_inside_where_that_is_faster(monkeypatch, dtype):
    model, layouts = unet_and_layouts(monkeypatch, [dtype])
    x, bound = randn(2, 3, 16, 16).to(dtype), WINOGRAD if dtype == torch.float32 else 2e-2
    model.to(dtype)
    with torch.no_grad():
        expected = model(x, STEPS).sample
        fastgen.accelerate(model)
        for y in (model(x, STEPS).sample, model(sample=x, timestep=STEPS, return_dict=False)[0], model(x, 3)[0]):
            assert y.is_contiguous()
        assert error(model(x, timestep=STEPS).sample, expected.double()) < bound
        assert layouts == [False, True, True, True, True]
        last = model(x.contiguous(memory_format=torch.channels_last), STEPS).sample
        assert not last.is_contiguous() and error(last, expected.double()) < bound
    del layouts[:]
    model(x, STEPS).sample.sum().backward()  # by the library's convolutions
    fastgen.accelerate(fastgen.restore(model), exact=True)
    with torch.no_grad():
        model(x, STEPS)
        fastgen.restore(model)
        assert torch.equal(model(x, STEPS).sample, expected) and layouts == [False] * 3


@torch.no_grad()
@pytest.mark.skipif(_library.ISA is None, reason="no kernels")
def test_a_u_net_is_not_turned_where_nothing_is_won(monkeypatch):
    model, layouts = unet_and_layouts(monkeypatch, [torch.bfloat16])
    fastgen.accelerate(model)(randn(2, 3, 16, 16), STEPS)
    (row,) = [row for row in fastgen.report(model).rows if row.name == ""]
    assert layouts == [False] and row.accelerated and row.kind == "UNet2DModel"


@torch.no_grad()
@pytest.mark.skipif(_library.ISA is None, reason="no kernels")
def test_a_u_net_is_not_turned_before_those_who_look(monkeypatch):
    model, layouts = unet_and_layouts(monkeypatch, [torch.float32])
    fastgen.accelerate(model)
    x = randn(2, 3, 16, 16)
    with torch.autocast("cpu"):
        model(x, STEPS)
    with Looking():
        model(x, STEPS)
    model(x, STEPS)
    assert layouts == [False, False, True]


class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_the_last_norm_of_a_u_net_is_in_its_last_convolution():
    """Which nobody calls, then, unless somebody looks."""
    model = randomize(diffusers.UNet2DModel(**SMALL | UNETS["attention"])).eval()
    x, seen = randn(2, 3, 16, 16), []
    expected = model(x, STEPS).sample
    forward = type(model.conv_act).forward
    silu = lambda self, x: seen.append(x) or forward(self, x)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.conv_act), "forward", silu)
        fastgen.accelerate(model)
        calls = []
        for _ in range(2):
            assert error(model(x, STEPS).sample, expected.double()) < WINOGRAD
            calls.append(len(seen))
            model.conv_act.register_forward_hook(lambda module, args, output: None)
    assert calls[1] - 2 * calls[0] == 1  # of the embedding in either


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_hook_on_the_norm_of_a_transformer_is_called(layout):
    theirs = import_peer("diffusers.models.transformers.transformer_2d")
    model = randomize(theirs.Transformer2DModel(2, 8, in_channels=16, norm_num_groups=4)).eval()
    x, seen = randn(2, 16, 6, 7).contiguous(memory_format=layout), []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x), fastgen.accelerate(model)(x)
    assert len(seen) == 2 and error(seen[1], seen[0].double()) < 1e-6


@pytest.mark.parametrize("name", ["AutoencoderKL", "VQModel"])
def test_autoencoders(name):
    model = randomize(
        getattr(diffusers, name)(
            block_out_channels=(16, 32), norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )
    )  # fmt: skip
    x = randn(2, 3, 16, 16)

    def call(m, dtype):
        encoded, latents = m.encode(x.to(dtype)), randn(2, m.config.latent_channels, 8, 8).to(dtype)
        mean = encoded.latents if name == "VQModel" else encoded.latent_dist.mean
        return torch.cat([mean.flatten(), m.decoder(m.post_quant_conv(latents)).flatten()])

    assert_accelerated(model, call, ("Conv2d", "GroupNorm", "ResnetBlock2D", "Attention"))


@torch.no_grad()
def test_processors_that_users_set():
    theirs = import_peer("diffusers.models.attention_processor")
    attention = randomize(theirs.Attention(16, heads=2, dim_head=8, norm_num_groups=4)).eval()
    x = randn(2, 5, 16)
    expected = attention(x)
    fastgen.accelerate(attention)
    assert type(attention.processor).__name__ in PROCESSORS and error(attention(x), expected.double()) < 1e-6

    class Mine:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return hidden_states + 1

    attention.set_processor(Mine())
    assert torch.equal(attention(x), x + 1)
    (row,) = [row for row in fastgen.report(fastgen.restore(attention)).rows if row.kind == "Attention"]
    assert row.detail == "processor Mine"


def pipeline():
    unet = randomize(diffusers.UNet2DModel(**SMALL, **UNETS["attention"]))
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe) -> torch.Tensor:
    images = pipe(
        batch_size=2, generator=torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np"
    ).images
    return torch.from_numpy(images)


def reloaded(pipe, folder):
    pipe.save_pretrained(folder)
    loaded = diffusers.DDIMPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_a_pipeline(tmp_path):
    """Model and scheduler; what is saved needs no fastgen; restored, the bits of before."""
    pipe = pipeline()
    scheduler, before = type(pipe.scheduler), draw(pipe)
    reloaded_before = draw(reloaded(pipe, tmp_path / "before"))  # on some machines not the bits of what was saved
    assert fastgen.accelerate(pipe) is pipe
    assert isinstance(pipe.scheduler, scheduler) and type(pipe.scheduler) is not scheduler
    assert error(draw(pipe), before.double()) < 10 * WINOGRAD  # steps amplify what a call differs
    rows = {row.name: row for row in fastgen.report(pipe).rows}
    assert rows["scheduler"].accelerated and rows["unet.conv_in"].accelerated
    loaded = reloaded(pipe, tmp_path / "after")
    assert type(loaded.scheduler) is scheduler and not any(mixin_of(m) for m in loaded.unet.modules())
    assert torch.equal(draw(loaded), reloaded_before)
    fastgen.restore(pipe)
    assert type(pipe.scheduler) is scheduler and torch.equal(draw(pipe), before)


def test_parts_of_a_pipeline():
    pipe = pipeline()
    fastgen.accelerate(pipe, exclude="unet")
    assert not any(mixin_of(m) for m in pipe.unet.modules()) and type(pipe.scheduler) is not diffusers.DDIMScheduler
    fastgen.restore(pipe)
    fastgen.accelerate(pipe, include="unet.conv_*")
    assert [n for n, m in pipe.unet.named_modules() if mixin_of(m)] == ["conv_in", "conv_norm_out", "conv_out"]
    assert type(pipe.scheduler) is diffusers.DDIMScheduler


def test_training_of_a_unet():
    """The loss over fifty steps of SGD, by the model itself and accelerated, with diffusers' gradient checkpointing too."""
    x, noise = randn(2, 3, 16, 16), randn(2, 3, 16, 16).flip(0)
    curves = []
    for accelerated, checkpointing in ((False, False), (True, False), (True, True)):
        model = randomize(diffusers.UNet2DModel(**SMALL, **UNETS["attention"])).train()
        if accelerated:
            fastgen.accelerate(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        losses = []
        for _ in range(50):
            loss = nn.functional.mse_loss(model(x, STEPS).sample, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert curves[0][-1] < 0.9 * curves[0][0]
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=1e-4, atol=0)


class LoRA(nn.Module):
    """A layer of low rank beside another, as adapters put it in the place of that one."""

    def __init__(self, base: nn.Module, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = base
        if isinstance(base, nn.Conv2d):
            self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, padding=base.padding, bias=False)
            self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        else:
            self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    def fused(self) -> torch.Tensor:
        """What the base's weight is with it."""
        return self.base.weight + torch.tensordot(self.up.weight.flatten(1), self.down.weight, 1)


@torch.no_grad()
def test_lora_attached_swapped_fused_and_detached_between_calls():
    plain = randomize(
        diffusers.UNet2DConditionModel(
            **SMALL, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=24, attention_head_dim=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    ).eval()  # fmt: skip
    models = plain, fastgen.accelerate(copy.deepcopy(plain))
    x, context = randn(2, 4, 16, 16), randn(2, 7, 24)
    adapted = [
        n for n, _ in plain.named_modules() if n.rpartition(".")[2] in ("to_q", "to_v", "conv1", "proj", "proj_in")
    ]
    outputs = []

    def compare():
        theirs, ours = (model(x, STEPS, context).sample for model in models)
        assert error(ours, theirs.double()) < 10 * WINOGRAD
        outputs.append(theirs)

    def attach(seed):
        for model in models:
            for i, name in enumerate(adapted):
                base = model.get_submodule(name)
                model.set_submodule(name, LoRA(getattr(base, "base", base), seed + i))

    compare()
    attach(1)
    compare()
    attach(100)  # another in its place
    compare()
    for model in models:  # fused
        for name in adapted:
            lora = model.get_submodule(name)
            lora.base.weight.copy_(lora.fused())
            model.set_submodule(name, lora.base)
    compare()
    assert error(outputs[3], outputs[2].double()) < 1e-5
    for a, b in itertools.pairwise(outputs[:3]):
        assert error(a, b.double()) > 1e-3
    assert any(type(m).__name__ == "Transformer2DModel" and mixin_of(m) for m in models[1].modules())
