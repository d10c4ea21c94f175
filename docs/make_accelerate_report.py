"""The report in README.md and docs/accelerate.md: of a pipeline of diffusers with the U-Net of DDPM on CIFAR-10, random weights."""

import contextlib
import io

from _pages import replace_part
from diffusers import DDPMPipeline, DDPMScheduler

import fastgen
from benchmarks.models.bench_accelerate import ddpm_cifar10, with_weights

if __name__ == "__main__":
    pipe = DDPMPipeline(unet=with_weights(ddpm_cifar10), scheduler=DDPMScheduler())
    with contextlib.redirect_stdout(io.StringIO()):
        text = str(fastgen.report(fastgen.accelerate(pipe)))
    for page in ("accelerate.md", "../README.md"):
        replace_part(page, "report", f"```\n{text}\n```")
