"""One forward of `fastgen.models.UNet` beside the same model with plain torch norms: what fusing the norms is worth in a whole.

Convolutions are the same in both and take most of the time; they set the limit to what this ratio can be.
"""

import functools
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastgen.models import UNet
from fastgen.nn import PlainGroupNorm

from ..cases import DTYPES, Case, Provider, Workload, random_tensor
from ..verify import Check, compare

# The U-Net of an 8x8 digits model, and that of DDPM on CIFAR-10 (Ho et al. 2020, appendix B).
CONFIGS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "unet_digits": (
        (100, 1, 8, 8),
        {"in_channels": 1, "model_channels": 32, "channel_mult": (1, 2), "attention_resolutions": (2,),
         "use_scale_shift_norm": True, "num_groups": 8},
    ),
    "unet_cifar": (
        (4, 3, 32, 32),
        {"in_channels": 3, "model_channels": 128, "channel_mult": (1, 2, 2, 2), "attention_resolutions": (2,)},
    ),
}  # fmt: skip


def cases(device: torch.device, full: bool) -> list[Case]:
    dtypes = ("fp32", "bf16") if device.type == "cuda" or full else ("fp32",)
    return [
        Case("model", mode, shape, dtype, functools.partial(build, mode, dtype, device))
        for mode, (shape, _) in CONFIGS.items()
        for dtype in dtypes
    ]


def build(mode: str, dtype: str, device: torch.device, allow_compile: bool) -> Workload:
    shape, config = CONFIGS[mode]
    fused = UNet(**config).eval()
    fill_zeros(fused)
    plain = UNet(**config, norm=PlainGroupNorm).eval()
    plain.load_state_dict(fused.state_dict())
    wide = UNet(**config, norm=PlainGroupNorm).eval().double()
    fused, plain = (model.to(device, DTYPES[dtype]) for model in (fused, plain))
    wide = wide.to(device)
    wide.load_state_dict(plain.state_dict())  # float64 arithmetic on the same rounded weights
    x = random_tensor(shape, device, dtype, seed=3)
    timesteps = torch.full(shape[:1], 500, device=device)
    calls = {"eager": functools.partial(plain, x, timesteps), "fastgen": functools.partial(fused, x, timesteps)}

    def check() -> list[Check]:
        expected = wide(x.double(), timesteps)
        return compare({name: (call(),) for name, call in calls.items()}, (expected,), yardstick="eager")

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(x, timesteps)
    weights = sum(p.nbytes for p in plain.parameters())
    return Workload(
        [Provider("eager", calls["eager"]), Provider("fastgen", calls["fastgen"], "fastgen")],
        check,
        min_bytes=weights + 2 * x.nbytes,
        flops=counter.get_total_flops(),
    )


def fill_zeros(model: torch.nn.Module) -> None:
    """Random numbers where the model begins with zeros: else its output is zero and a comparison proves nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
