"""The U-Net of Stable Diffusion 1, as CompVis' repository has it, before and after `fastgen.accelerate`, with random weights.

Needs the repository on the path, and einops: `PYTHONPATH=path/to/stable-diffusion python examples/accelerate_latent_diffusion.py`.
"""

import argparse

import torch
from both_ways import compare, random_weights
from ldm.modules.diffusionmodules.openaimodel import UNetModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-channels", type=int, default=160, help="320 is Stable Diffusion's width")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=arguments.model_channels, num_res_blocks=2,
        attention_resolutions=(4, 2, 1), channel_mult=(1, 2, 4, 4), num_heads=8, use_spatial_transformer=True,
        transformer_depth=1, context_dim=768, use_checkpoint=False, legacy=False,
    )  # fmt: skip
    x, steps, context = torch.randn(2, 4, 32, 32), torch.tensor([500, 500]), torch.randn(2, 77, 768)
    compare(random_weights(model), lambda unet: unet(x, steps, context))


if __name__ == "__main__":
    main()
