"""Other projects' own models and a whole pipeline, as they are and after `fastgen.accelerate`."""

import copy
import functools
import gc
import importlib.util
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastgen
from fastgen.ops._packed_weights import WEIGHTS

from .. import peer_unets
from ..cases import DTYPES, Case, Provider, SetUp, Workload, compiled, random_tensor
from ..machine import resident_bytes
from ..openvino_peer import converted, of_float32
from ..verify import Values
from .bench_unet import BOUND, fill_zeros

STEPS = 4  # of a pipeline, enough that its time is a step's
SD15 = {"sample_size": 32, "cross_attention_dim": 768}


@dataclass(frozen=True)
class Model:
    """A model with random weights, and what it is called with.

    Args:
        of: project and class.
        build: makes it.
        shape: of its input.
        large: the same in a full run.
        steps: whether it takes timesteps.
        context: width of the 77 tokens that it takes, if any.
        full: whether it is measured in a full run alone.
        bf16: whether it is measured in bfloat16 too.
    """

    of: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    large: tuple[int, ...] | None = None
    steps: bool = True
    context: int | None = None
    full: bool = False
    bf16: bool = True

    def arguments(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of a call with the image ``x``."""
        args = (x,)
        if self.steps:
            args += (torch.full(x.shape[:1], 500, device=x.device),)
        if self.context is not None:
            args += (random_tensor((x.shape[0], 77, self.context), x.device, "fp32", seed=4).to(x.dtype),)
        return args


def diffusers_model(name: str, **config: Any) -> nn.Module:
    import diffusers

    return getattr(diffusers, name)(**config)


def vae_decoder() -> nn.Module:
    return diffusers_model(
        "AutoencoderKL", sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).decoder  # fmt: skip


ddpm_cifar10 = functools.partial(
    diffusers_model, "UNet2DModel", sample_size=32, block_out_channels=(128, 256, 256, 256), attention_head_dim=None,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
)  # fmt: skip
sd15_half_width = functools.partial(
    diffusers_model, "UNet2DConditionModel", **SD15, block_out_channels=(160, 320, 640, 640)
)
sd15 = functools.partial(diffusers_model, "UNet2DConditionModel", **SD15, block_out_channels=(320, 640, 1280, 1280))


def models() -> dict[str, Model]:
    """DDPM on CIFAR-10 (google/ddpm-cifar10-32), Stable Diffusion 1.5 at half its width and whole, its decoder, and the U-Nets of
    other projects where these can be imported."""
    found = {}
    if importlib.util.find_spec("diffusers") is not None:
        found = {
            "ddpm_cifar10": Model("diffusers' UNet2DModel", ddpm_cifar10, (4, 3, 32, 32)),
            "sd15_half_width": Model("diffusers' UNet2DConditionModel", sd15_half_width, (2, 4, 32, 32), context=768),
            "sd15": Model("diffusers' UNet2DConditionModel", sd15, (2, 4, 64, 64), context=768, full=True),
            "vae_decode": Model(
                "diffusers' AutoencoderKL", vae_decoder, (1, 4, 32, 32), large=(1, 4, 64, 64), steps=False
            ),
        }
    if peer_unets.there(peer_unets.guided_diffusion):
        found["imagenet64"] = Model(
            "guided-diffusion's UNetModel", peer_unets.guided_diffusion, (1, 3, 64, 64), bf16=False
        )
    if peer_unets.there(peer_unets.denoising_diffusion):
        found["ddp_default"] = Model(
            "denoising-diffusion-pytorch's Unet",
            peer_unets.denoising_diffusion,
            (1, 3, 64, 64),
            (4, 3, 128, 128),
            bf16=False,
        )
    return found


def cases(device: torch.device, full: bool) -> list[Case]:
    known = models()
    made = []
    for mode, model in known.items():
        if model.full and not full:
            continue
        shape = model.large if full and model.large else model.shape
        for layout in ("NCHW", "NHWC"):
            for dtype in ("fp32", "bf16") if model.bf16 else ("fp32",):
                title = f"{model.of}, {mode}{', channels-last' if layout == 'NHWC' else ''}"
                build_it = functools.partial(build, model, layout, dtype, device, shape)
                made.append(Case("accelerate", mode, shape, dtype, build_it, title, layout=layout))
    if "ddpm_cifar10" in known:
        shape = known["ddpm_cifar10"].shape
        whole = functools.partial(build_pipeline, shape, device)
        made.append(
            Case("accelerate", "ddim_pipeline", shape, "fp32", whole, f"diffusers' DDIMPipeline, {STEPS} steps")
        )
    return made


def with_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """The model with random weights, no layer of it silent."""
    torch.manual_seed(0)
    model = build().eval()
    fill_zeros(model)
    return model


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
    model: Model, layout: str, dtype: str, device: torch.device, shape: tuple[int, ...], allow_compile: bool
) -> Workload:
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    plain = with_weights(model.build).to(device, DTYPES[dtype], memory_format=memory_format)
    x = random_tensor(shape, device, dtype, seed=3, layout=layout)
    args = model.arguments(x)
    models: dict[str, Any] = {"eager": plain}
    notes: list[str] = []
    shared = (
        {id(p): p for p in plain.parameters()} if model.full else {}
    )  # of the largest there is no room for another copy
    fused = copy.deepcopy(plain, shared)
    with torch.no_grad():
        note, of_fastgen = first_outputs(plain, fused, args)
        notes.append(note)
        function, of_compile = set_up(lambda: compiled(plain, args, allow_compile, notes))
        if function is not None:
            models["compile"] = function
    taken = {"fastgen": of_fastgen} | ({"compile": of_compile} if function is not None else {})
    if layout == "NCHW":  # it has layouts of its own
        wanted = tuple(arg.float() if arg.is_floating_point() else arg for arg in args)
        function, of_conversion = set_up(
            lambda: converted(Sample(copy.deepcopy(plain).float()), wanted, dtype, allow_compile, notes)
        )
        if function is not None:
            models["openvino"] = functools.partial(of_float32, function, x.float())
            taken["openvino"] = of_conversion
    models["fastgen"] = fused

    def expected() -> tuple[Tensor]:
        wide = peer_unets.in_float64(plain)
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
        set_up=taken,
    )


def set_up(make: Callable[[], Any]) -> tuple[Any, SetUp]:
    """What ``make`` returns, the time that it takes, and by how much the process has grown after it."""
    gc.collect()
    before, begin = resident_bytes(), time.perf_counter()
    made = make()
    seconds = time.perf_counter() - begin
    gc.collect()
    return made, SetUp(seconds, resident_bytes() - before)


def first_outputs(plain: nn.Module, fused: nn.Module, args: tuple[Tensor, ...]) -> tuple[str, SetUp]:
    """Accelerates ``fused``; says how long its first output took, and the bytes that its kernels keep of its weights."""
    output(plain, *args)
    before = WEIGHTS.bytes
    marks = [time.perf_counter()]
    for step in (
        functools.partial(output, plain, *args),
        functools.partial(fastgen.accelerate, fused),
        functools.partial(output, fused, *args),
        functools.partial(output, fused, *args),
    ):
        step()
        marks.append(time.perf_counter())
    eager, accelerate, first, second = (b - a for a, b in itertools.pairwise(marks))
    weights, kept = sum(p.nbytes for p in plain.parameters()), WEIGHTS.bytes - before
    note = (
        f"accelerate took {accelerate:.2f} s, the first output {first:.2f} s, the second {second:.2f} s (eager {eager:.2f} s); "
        f"{kept / 1e6:.0f} MB beside {weights / 1e6:.0f} MB of weights"
    )
    return note, SetUp(accelerate + max(first - second, 0.0), kept)


def build_pipeline(shape: tuple[int, ...], device: torch.device, allow_compile: bool) -> Workload:
    """From noise to images, as a user's program draws them: model, scheduler and what the pipeline does around them."""
    import diffusers

    plain = diffusers.DDIMPipeline(unet=with_weights(ddpm_cifar10).to(device), scheduler=diffusers.DDIMScheduler())
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
