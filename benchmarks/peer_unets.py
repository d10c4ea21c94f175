"""U-Nets of projects whose packages want much else: built where the file with the U-Net can be imported, the rest stubbed.

guided-diffusion is a folder on the path (`PYTHONPATH=path/to/guided-diffusion`); denoising-diffusion-pytorch needs einops.
"""

import copy
import importlib
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import nn

# Of denoising-diffusion-pytorch: for training, and for reading and writing images.
TRAINING = {"torchvision": ("transforms", "utils"), "ema_pytorch": ("EMA",), "accelerate": ("Accelerator",)}


def guided_diffusion() -> nn.Module:
    """That of ImageNet 64x64 without classes, 296 million parameters (Dhariwal and Nichol 2021, table 4)."""
    return importlib.import_module("guided_diffusion.unet").UNetModel(
        image_size=64, in_channels=3, model_channels=192, out_channels=6, num_res_blocks=3, attention_resolutions=(2, 4, 8),
        channel_mult=(1, 2, 3, 4), num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True,
        use_new_attention_order=True,
    )  # fmt: skip


def denoising_diffusion() -> nn.Module:
    """The default of its README, 36 million parameters."""
    return _denoising_diffusion().Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=True)


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64 all through: guided-diffusion keeps a dtype of its own, its norms and its sinusoids are of float32."""
    wide: Any = copy.deepcopy(model).double()
    if type(getattr(wide, "dtype", None)) is torch.dtype and "dtype" in vars(wide):
        wide.dtype = torch.float64
    for module in wide.modules():
        if type(module).__name__ == "GroupNorm32":
            module.__class__ = nn.GroupNorm
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: tuple(arg.double() for arg in args))
    return wide


def _denoising_diffusion() -> Any:
    name = "denoising_diffusion_pytorch"
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{name} is not installed")
    package: Any = types.ModuleType(name)  # without what its __init__ imports
    package.__path__ = list(spec.submodule_search_locations)
    stubs: dict[str, Any] = {name: package}
    for other, names in TRAINING.items():
        if importlib.util.find_spec(other) is None:
            stubs[other] = types.ModuleType(other)
            vars(stubs[other]).update(dict.fromkeys(names))
    sys.modules.update(stubs)
    try:
        return importlib.import_module(f"{name}.{name}")
    finally:
        for stub in stubs:  # others look for them too
            del sys.modules[stub]


def there(build: Any) -> bool:
    """Whether the project of ``build`` can be imported."""
    needs = {guided_diffusion: ("guided_diffusion",), denoising_diffusion: ("denoising_diffusion_pytorch", "einops")}
    return all(importlib.util.find_spec(name) is not None for name in needs[build])
