"""Compiles every Triton kernel for one architecture without a GPU and prints what it costs, as JSON lines.

Run as `python -m tests.kernels.compile_worker 90`. A process of its own, so that nothing else has set up Triton otherwise.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastgen  # noqa: F401  (makes fastgen.kernels importable)

FLOAT = {"fp32": "fp32", "bf16": "fp32", "fp16": "fp32", "fp64": "fp64"}  # storage -> accumulation
TL = {"fp32": triton.language.float32, "fp64": triton.language.float64}


def _group_norm_cases() -> list[tuple[str, Any, dict[str, Any]]]:
    forward = importlib.import_module("fastgen.kernels.group_norm")
    backward = importlib.import_module("fastgen.kernels._group_norm_bwd")
    cases = []
    for storage, acc in FLOAT.items():
        common = {"ACC": TL[acc], "BLOCK_P": 1024, "BLOCK_C": 2}
        last = {"ACC": TL[acc], "BLOCK_P": 16, "BLOCK_C": 128}
        params = {name: f"*{acc}" for name in ("weight", "bias", "channel_bias", "scale", "shift")}
        io = {"x": f"*{storage}", "y": f"*{storage}", "dy": f"*{storage}", "dx": f"*{storage}"}
        acc_pointers = {
            name: f"*{acc}"
            for name in (
                "part_mean",
                "part_m2",
                "parts",
                "mean",
                "rstd",
                "mean_out",
                "rstd_out",
                "maps",
                "combine",
                "grads",
            )
        }
        types = {**io, **params, **acc_pointers}
        for layout, tile in (("contiguous", common), ("channels-last", last)):
            stride = {"stride_p" if layout == "contiguous" else "stride_c": 1}
            tag = f"{storage} {layout}"
            cases += [
                (f"moments {tag}", forward.moments_kernel, {**types, **tile, **stride}),
                (f"apply {tag}", forward.apply_kernel, {**types, **tile, **stride, "SILU": True}),
                (f"sums {tag}", backward.sums_kernel, {**types, **tile, **stride, "SILU": True}),
                (f"dx {tag}", backward.dx_kernel, {**types, **tile, **stride, "SILU": True}),
            ]
        cases += [
            (f"finish {storage}", forward.finish_kernel, {**types, "EPS": 1e-5, "BLOCK_D": 16, "ACC": TL[acc]}),
            (f"combine {storage}", backward.combine_kernel, {**types, "BLOCK_D": 16, "ACC": TL[acc]}),
            (
                f"whole {storage}",
                forward.whole_kernel,
                {**types, "EPS": 1e-5, "SILU": True, "BLOCK_P": 256, "BLOCK_D": 8, "ACC": TL[acc], "stride_p": 1},
            ),
        ]
    return cases


def _other_cases() -> list[tuple[str, Any, dict[str, Any]]]:
    philox = importlib.import_module("fastgen.kernels.philox_normal")
    step = importlib.import_module("fastgen.kernels.sampler_step")
    cases = [
        ("philox", philox.philox_normal_kernel, {"out": "*fp32", "seeds": "*i64", "step": "i64", "BLOCK": philox.BLOCK})
    ]
    every = (
        "sample",
        "model_output",
        "uncond",
        "h0",
        "h1",
        "h2",
        "h3",
        "noise",
        "variance",
        "mask_keep",
        "known",
        "known_noise",
    )
    for storage, acc in FLOAT.items():
        for name, given in (("least", every[:2]), ("most", [n for n in every if n != "noise"])):
            for noise in ("channels-last", "quads") if name == "most" else ("none",):
                types: dict[str, Any] = {n: f"*{storage}" if n in given else None for n in every}
                types |= {"out": f"*{storage}", "second": f"*{storage}" if name == "most" else None, "table": f"*{acc}"}
                types |= {"seeds": None if noise == "none" else "*i64", "BLOCK": step.BLOCK, "ACC": TL[acc]}
                types |= {"CHANNELS_LAST": noise == "channels-last", "QUADS": noise == "quads"}
                cases.append((f"step {name} {noise} {storage}", step.sampler_step_kernel, types))
    return cases


def _compile(kernel: Any, types: dict[str, Any], arch: int) -> Any:
    signature, constants = {}, {}
    for name in kernel.arg_names:
        value = types.get(name, "i32")
        if isinstance(value, str):
            signature[name] = value
        else:
            signature[name] = "constexpr"
            constants[(kernel.arg_names.index(name),)] = value
    warps = importlib.import_module(kernel.fn.__module__).__dict__.get("WARPS", 4)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main(arch: int) -> None:
    for name, kernel, types in _group_norm_cases() + _other_cases():
        compiled = _compile(kernel, types, arch)
        ptx = compiled.asm["ptx"]
        record = {"name": name, "arch": arch, "f64": ptx.count(".f64"), **_resources(compiled.asm["cubin"])}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
