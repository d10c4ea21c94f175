"""k-diffusion's U-Net (`ImageDenoiserModelV1`) before and after `fastgen.accelerate`, with random weights.

Needs the project: `pip install k-diffusion`.
"""

import argparse

import torch
from both_ways import compare, random_weights
from k_diffusion.models import ImageDenoiserModelV1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32, help="of the images")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = ImageDenoiserModelV1(
        c_in=3, feats_in=256, depths=(2, 4, 4), channels=(128, 256, 512), self_attn_depths=(False, True, True)
    )
    x, sigma = torch.randn(1, 3, arguments.size, arguments.size), torch.tensor([1.0])
    compare(random_weights(model), lambda unet: unet(x, sigma))


if __name__ == "__main__":
    main()
