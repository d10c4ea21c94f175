"""The default U-Net of denoising-diffusion-pytorch before and after `fastgen.accelerate`, with random weights.

Needs the project: `pip install denoising-diffusion-pytorch`.
"""

import argparse

import torch
from both_ways import compare, random_weights
from denoising_diffusion_pytorch import Unet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128, help="of the images")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = random_weights(Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=True))
    x, steps = torch.randn(1, 3, arguments.size, arguments.size), torch.tensor([500])
    compare(model, lambda unet: unet(x, steps))


if __name__ == "__main__":
    main()
