"""guided-diffusion's U-Net of ImageNet 64x64 before and after `fastgen.accelerate`, with random weights unless a file is named.

Needs its repository on the path: `PYTHONPATH=path/to/guided-diffusion python examples/accelerate_guided_diffusion.py`.
"""

import argparse

import torch
from both_ways import compare, random_weights
from guided_diffusion.unet import UNetModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="64x64_diffusion.pt of the project")
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = UNetModel(
        image_size=64, in_channels=3, model_channels=192, out_channels=6, num_res_blocks=3, attention_resolutions=(2, 4, 8),
        channel_mult=(1, 2, 3, 4), num_classes=1000, num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True,
        use_new_attention_order=True,
    )  # fmt: skip
    if arguments.weights is None:
        random_weights(model)
    else:
        model.load_state_dict(torch.load(arguments.weights, weights_only=True))
    n = arguments.batch_size
    x, steps, classes = torch.randn(n, 3, 64, 64), torch.full((n,), 500), torch.arange(n)
    compare(model.eval(), lambda unet: unet(x, steps, classes))


if __name__ == "__main__":
    main()
