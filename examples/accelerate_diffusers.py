"""A pipeline of diffusers before and after `fastgen.accelerate`: images, times, and the report.

Without arguments it builds the U-Net of DDPM on CIFAR-10 with random weights; `--pretrained google/ddpm-cifar10-32` loads one.
"""

import argparse
import time

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import fastgen


def build(pretrained: str | None) -> DDIMPipeline:
    if pretrained is not None:
        return DDIMPipeline.from_pretrained(pretrained)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    return DDIMPipeline(unet=unet, scheduler=DDIMScheduler())


def draw(pipe: DDIMPipeline, steps: int) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    images = pipe(
        batch_size=4, generator=torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np"
    ).images
    return torch.from_numpy(images), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", help="name or folder of a pipeline (default: random weights)")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    pipe = build(arguments.pretrained)
    before, plain = draw(pipe, arguments.steps)
    fastgen.accelerate(pipe)
    fastgen.report(pipe)
    after, fast = draw(pipe, arguments.steps)
    print(f"diffusers {plain:.2f} s, accelerated {fast:.2f} s: {plain / fast:.2f} times as fast, its set-up included")
    print(f"largest difference of a pixel: {(before - after).abs().max():.1e} of 1")
    fastgen.restore(pipe)
    again, _ = draw(pipe, arguments.steps)
    print(f"restored: the same bits {torch.equal(again, before)}")


if __name__ == "__main__":
    main()
