"""diffusers' own models and a whole pipeline, as they are and after `fastgen.accelerate`."""

import copy
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastgen

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..openvino_peer import converted, of_float32
from ..verify import Values
from .bench_unet import BOUND, fill_zeros

STEPS = 4  # of a pipeline, enough that its time is a step's
# DDPM on CIFAR-10 (google/ddpm-cifar10-32), Stable Diffusion 1.5 at half its width, and its decoder.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm_cifar10": ("UNet2DModel", {
        "sample_size": 32, "block_out_channels": (128, 256, 256, 256), "attention_head_dim": None,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
    }),
    "sd15_half_width": ("UNet2DConditionModel", {
        "sample_size": 32, "block_out_channels": (160, 320, 640, 640), "cross_attention_dim": 768,
    }),
    "vae_decode": ("AutoencoderKL", {
        "sample_size": 512, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    }),
}  # fmt: skip
SHAPES = {"ddpm_cifar10": (4, 3, 32, 32), "sd15_half_width": (2, 4, 32, 32), "vae_decode": (1, 4, 32, 32)}
FULL = {"vae_decode": (1, 4, 64, 64)}


def cases(device: torch.device, full: bool) -> list[Case]:
    if importlib.util.find_spec("diffusers") is None:
        return []
    dtypes = ("fp32", "bf16") if device.type == "cuda" or full else ("fp32",)
    models = [
        Case(
            "accelerate", mode, (FULL if full else SHAPES).get(mode, SHAPES[mode]), dtype,
            functools.partial(build, mode, layout, dtype, device, (FULL if full else SHAPES).get(mode, SHAPES[mode])),
            f"diffusers' {CONFIGS[mode][0]}, {mode}{', channels-last' if layout == 'NHWC' else ''}", layout=layout,
        )
        for mode in CONFIGS
        for layout in ("NCHW", "NHWC")
        for dtype in dtypes
    ]  # fmt: skip
    shape = SHAPES["ddpm_cifar10"]
    whole = functools.partial(build_pipeline, shape, device)
    return [
        *models,
        Case("accelerate", "ddim_pipeline", shape, "fp32", whole, f"diffusers' DDIMPipeline, {STEPS} steps"),
    ]


def model_of(mode: str) -> nn.Module:
    import diffusers

    name, config = CONFIGS[mode]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config).eval()
    fill_zeros(model)
    return model.decoder if mode == "vae_decode" else model


def call_of(mode: str, x: Tensor) -> tuple[Tensor, ...]:
    """The arguments of a call."""
    if mode == "vae_decode":
        return (x,)
    step = torch.full(x.shape[:1], 500, device=x.device)
    if mode == "ddpm_cifar10":
        return x, step
    return x, step, random_tensor((x.shape[0], 77, 768), x.device, "fp32", seed=4).to(x.dtype)


def output(model: Callable[..., Any], *args: Tensor) -> Tensor:
    made = model(*args)
    return made if isinstance(made, Tensor) else made.sample


class Sample(nn.Module):
    """A model that returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> Tensor:
        return output(self.model, *args)


def build(
    mode: str, layout: str, dtype: str, device: torch.device, shape: tuple[int, ...], allow_compile: bool
) -> Workload:
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    plain = model_of(mode).to(device, DTYPES[dtype], memory_format=memory_format)
    fused = fastgen.accelerate(copy.deepcopy(plain))
    x = random_tensor(shape, device, dtype, seed=3, layout=layout)
    args = call_of(mode, x)
    models: dict[str, Any] = {"eager": plain}
    notes: list[str] = []
    with torch.no_grad():
        function = compiled(plain, args, allow_compile, notes)
        if function is not None:
            models["compile"] = function
    if layout == "NCHW":  # it has layouts of its own
        wanted = tuple(arg.float() if arg.is_floating_point() else arg for arg in args)
        function = converted(Sample(copy.deepcopy(plain).float()), wanted, dtype, allow_compile, notes)
        if function is not None:
            models["openvino"] = functools.partial(of_float32, function, x.float())
    models["fastgen"] = fused

    def expected() -> tuple[Tensor]:
        wide = copy.deepcopy(plain).double()
        with torch.no_grad():
            return (output(wide, *(a.double() if a.is_floating_point() else a for a in args)),)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(*args)
    return Workload(
        [
            Provider(name, functools.partial(output, model, *args), "fastgen" if name == "fastgen" else "baseline")
            for name, model in models.items()
        ],
        (Values(expected, tolerance=BOUND) if dtype == "fp32" else Values(expected, yardstick="eager"),),
        min_bytes=sum(p.nbytes for p in plain.parameters()) + 2 * x.nbytes,
        flops=counter.get_total_flops(),
        notes=notes,
    )


def build_pipeline(shape: tuple[int, ...], device: torch.device, allow_compile: bool) -> Workload:
    """From noise to images, as a user's program draws them: model, scheduler and what the pipeline does around them."""
    import diffusers

    plain = diffusers.DDIMPipeline(unet=model_of("ddpm_cifar10").to(device), scheduler=diffusers.DDIMScheduler())
    plain.set_progress_bar_config(disable=True)
    fused = fastgen.accelerate(copy.deepcopy(plain))

    def draw(pipe: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        made = pipe(batch_size=shape[0], generator=generator, num_inference_steps=STEPS, output_type="np")
        return torch.from_numpy(made.images)

    def expected() -> tuple[Tensor]:
        return (draw(plain).double(),)

    with FlopCounterMode(display=False) as counter:
        draw(plain)
    providers = [
        Provider("eager", functools.partial(draw, plain), "baseline"),
        Provider("fastgen", functools.partial(draw, fused), "fastgen"),
    ]
    tolerance = Values(expected, tolerance=10 * BOUND)  # steps amplify what a call differs
    return Workload(
        providers, (tolerance,), sum(p.nbytes for p in plain.unet.parameters()) * STEPS, counter.get_total_flops()
    )
