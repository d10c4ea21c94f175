"""From `import fastgen` to the first accelerated output of a model that is in memory: `python -m benchmarks.first_output`.

The U-Net of DDPM on CIFAR-10 by diffusers, batch 4, float32. One process, for an import is done once; run it several times. The
package's bytecode is written before, as pip does when it installs one.
"""

import compileall
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def write_bytecode(package: str) -> None:
    found = importlib.util.find_spec(package)  # found, not imported
    if found is not None and found.origin is not None:
        compileall.compile_dir(Path(found.origin).parent, quiet=1)


def main() -> None:
    write_bytecode("fastgen")
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    x, step = torch.randn(4, 3, 32, 32), torch.tensor(500)

    def import_fastgen() -> None:
        global fastgen
        import fastgen

    with torch.no_grad():
        first_eager = seconds(lambda: model(x, step))
        eager = min(seconds(lambda: model(x, step)) for _ in range(5))
        imported = seconds(import_fastgen)
        accelerated = seconds(lambda: fastgen.accelerate(model))  # type: ignore[name-defined]
        first = seconds(lambda: model(x, step))
        second = min(seconds(lambda: model(x, step)) for _ in range(5))
    weights = first - second
    print(f"eager: the first forward {first_eager:.3f} s, later ones {eager:.3f} s")
    print(
        f"import {imported:.3f} s, accelerate {accelerated:.3f} s, first output {first:.3f} s, later ones {second:.3f} s"
    )
    print(
        f"from import to the first output {imported + accelerated + first:.3f} s, {weights:.3f} s of them the weights'"
    )
    print(f"without the weights' {(imported + accelerated + second) / eager:.2f} of an eager forward")


if __name__ == "__main__":
    main()
