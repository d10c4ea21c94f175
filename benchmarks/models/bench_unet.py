"""One forward of `fastgen.models.UNet` beside the same model with torch's own norms, convolutions and attention."""

import copy
import functools
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastgen.models import UNet
from fastgen.nn import PlainGroupNorm

from ..cases import DTYPES, Case, Provider, Workload, compiled, random_tensor
from ..openvino_peer import converted, of_float32
from ..verify import Values

BOUND = 2e-5  # of a model with Winograd's convolutions, in fp32
# The U-Net of DDPM on CIFAR-10 (Ho et al. 2020, appendix B), that of an 8x8 digits model, and guided-diffusion's of ImageNet 64x64
# without classes (Dhariwal and Nichol 2021, 296 million parameters).
CONFIGS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "unet_cifar": (
        (4, 3, 32, 32),
        {"in_channels": 3, "model_channels": 128, "channel_mult": (1, 2, 2, 2), "attention_resolutions": (2,)},
    ),
    "unet_digits": (
        (100, 1, 8, 8),
        {"in_channels": 1, "model_channels": 32, "channel_mult": (1, 2), "attention_resolutions": (2,),
         "use_scale_shift_norm": True, "num_groups": 8},
    ),
    "unet_imagenet64": (
        (1, 3, 64, 64),
        {"in_channels": 3, "model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3,
         "attention_resolutions": (2, 4, 8), "num_head_channels": 64, "use_scale_shift_norm": True, "resblock_updown": True,
         "learn_sigma": True},
    ),
}  # fmt: skip


def cases(device: torch.device, full: bool) -> list[Case]:
    dtypes = ("fp32", "bf16") if device.type == "cuda" or full else ("fp32",)
    return [
        Case(
            "model", mode, shape, dtype, functools.partial(build, mode, layout, dtype, device),
            f"whole U-Net, {mode.removeprefix('unet_')}{', channels-last' if layout == 'NHWC' else ''}", layout=layout,
        )
        for mode, (shape, _) in CONFIGS.items()
        for layout in ("NCHW", "NHWC")
        for dtype in dtypes
        if full or (mode, layout) != ("unet_imagenet64", "NHWC")
    ]  # fmt: skip


def build(mode: str, layout: str, dtype: str, device: torch.device, allow_compile: bool) -> Workload:
    shape, config = CONFIGS[mode]
    fused = UNet(**config).eval()
    fill_zeros(fused)
    plain = UNet(**config, norm=PlainGroupNorm).eval()
    plain.load_state_dict(fused.state_dict())
    wide = UNet(**config, norm=PlainGroupNorm).eval().double()
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    fused, plain = (model.to(device, DTYPES[dtype], memory_format=memory_format) for model in (fused, plain))
    wide = wide.to(device)
    wide.load_state_dict(plain.state_dict())  # float64 arithmetic on the same rounded weights
    x = random_tensor(shape, device, dtype, seed=3, layout=layout)
    timesteps = torch.full(shape[:1], 500, device=device)
    models: dict[str, Any] = {"eager": plain}
    notes: list[str] = []
    with torch.no_grad():
        function = compiled(plain, (x, timesteps), allow_compile, notes)
        if function is not None:  # a compiled module has a length, so no truth value
            models["compile"] = function
    if layout == "NCHW":  # it has layouts of its own
        function = converted(copy.deepcopy(plain).float(), (x.float(), timesteps), dtype, allow_compile, notes)
        if function is not None:
            models["openvino"] = functools.partial(of_float32, function, x.float())
    models["fastgen"] = fused

    def expected() -> tuple[torch.Tensor]:
        with torch.no_grad():
            return (wide(x.double(), timesteps),)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(x, timesteps)
    weights = sum(p.nbytes for p in plain.parameters())
    return Workload(
        [
            Provider(name, functools.partial(model, x, timesteps), "fastgen" if name == "fastgen" else "baseline")
            for name, model in models.items()
        ],
        (Values(expected, tolerance=BOUND) if dtype == "fp32" else Values(expected, yardstick="eager"),),
        min_bytes=weights + 2 * x.nbytes,
        flops=counter.get_total_flops(),
        notes=notes,
    )


def fill_zeros(model: torch.nn.Module) -> None:
    """Random numbers where the model begins with zeros: else its output is zero and a comparison proves nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
