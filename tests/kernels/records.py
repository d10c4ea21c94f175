"""What a Triton kernel costs once compiled, as one record, and the cache of these records.

A record is found again by the hash of everything it depends on: the kernel's source and that of every function it calls, signature,
specialisation, options, architecture, Triton's version, this file and `ptx`; not the lines where functions stand. It holds what was
measured and no verdict: a kernel over its budget is over it again when its record comes from the cache.
"""

import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.kernels import ptx

CACHE = Path(__file__).parents[2] / ".cache/kernels"  # git ignores it, `make clean` removes it


def record_of(source: ASTSource, arch: int, options: dict[str, Any], cache: Path = CACHE) -> dict[str, Any]:
    """Registers, stack, local and shared memory, fp64 instructions, and loads and stores by width, of ``source`` compiled for
    sm_``arch``."""
    file = cache / f"{key(source, arch, options)}.json"
    if file.exists():
        return json.loads(file.read_text())
    found = measure(source, arch, options)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=cache, suffix=".tmp", delete=False) as temporary:
        temporary.write(json.dumps(found))
    os.replace(temporary.name, file)  # whole or not at all: two processes may write the same record
    return found


def forget_lines(module: ModuleType) -> None:
    """Before anything is hashed: Triton's hash has the line where a function begins, so that an import above it would be another
    kernel."""
    for value in vars(module).values():
        if isinstance(value, JITFunction):
            value.starting_line_number = 0


def key(source: ASTSource, arch: int, options: dict[str, Any]) -> str:
    """The hash of what decides a record; `ASTSource.hash` is that of source, signature and specialisation."""
    parts = [
        source.hash(),
        str(arch),
        json.dumps(options, sort_keys=True),
        triton.__version__,
        Path(__file__).read_text(),
        Path(ptx.__file__).read_text(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def measure(source: ASTSource, arch: int, options: dict[str, Any]) -> dict[str, Any]:
    """Compiles, without a GPU."""
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    text = compiled.asm["ptx"]
    wide = re.findall(r"^\s+(?:@%p\d+ )?(\S*\.f64\S*)", text, re.MULTILINE)
    accesses = {"loads": ptx.widths(text, "ld"), "stores": ptx.widths(text, "st")}
    again = {"loads after a store": ptx.loads_after_a_store(text)}
    return {"f64": sorted(set(wide)), **accesses, **again, **_resources(compiled.asm["cubin"])}


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
