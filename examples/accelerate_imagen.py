"""A U-Net of imagen-pytorch before and after `fastgen.accelerate`, with random weights.

Needs the project: `pip install imagen-pytorch`.
"""

import torch
from both_ways import compare, random_weights
from imagen_pytorch import Unet


def main() -> None:
    torch.manual_seed(0)
    model = Unet(
        dim=64, cond_dim=256, dim_mults=(1, 2, 4, 8), num_resnet_blocks=2, text_embed_dim=512,
        layer_attns=(False, False, True, True), layer_cross_attns=(False, True, True, True),
    )  # fmt: skip
    x, steps, text = torch.randn(1, 3, 64, 64), torch.tensor([0.5]), torch.randn(1, 77, 512)
    compare(random_weights(model), lambda unet: unet(x, steps, text_embeds=text))


if __name__ == "__main__":
    main()
