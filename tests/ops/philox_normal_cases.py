"""Arguments of `philox_normal` for its tests on every device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import _dispatch
from fastgen.ops import philox_normal
from fastgen.reference import philox_normal as reference

from .families import Call, OfTensors

KERNEL_CASES = {
    "three seeds": ([1, -5, 2**40 + 3], (3, 1000), 3),
    "step -1": ([7], (1, 3, 5, 7), -1),
    "one number": ([7, 9], (2, 1), 2**32 - 1),
    "one of everything": ([3], (1, 1), 1),
    "tail": ([3], (1, 2049), 0),
}
NO_STORAGE_TYPE = {"philox_normal.philox_normal_kernel"}  # float32, whatever becomes of the normals


def example(dtype: torch.dtype) -> dict[str, Any]:
    return {"seeds": torch.tensor([1, -5]), "shape": (2, 3, 5), "step": 3, "dtype": dtype}


REFUSED = [
    ("philox_normal", {"shape": [3, 5]}, "seeds"),
    ("philox_normal", {"shape": [2, -1]}, "shape"),
    ("philox_normal", {"shape": []}, "shape"),
    ("philox_normal", {"shape": [2, 2**32, 2**32]}, "shape"),
]
MAPPED = OfTensors(lambda seeds: philox_normal(seeds, (2, 3, 5), 4), lambda k: [torch.tensor([k, -k])])
EXPORTED = {
    "philox_normal": OfTensors(
        lambda seeds: philox_normal(seeds, (seeds.shape[0], 3, 5), 2), lambda n: [torch.arange(n) * 2**40]
    )
}


def harmless(op: str, name: str, how: str, arguments: dict[str, Any]) -> bool:
    """Nothing but the seeds says where the normals are wanted."""
    return how == "the meta device"


def counted(step: int) -> Tensor:
    return philox_normal(torch.arange(2), (2, 3), step)


def calls() -> Iterator[Call]:
    for name, (seeds, shape, step) in KERNEL_CASES.items():
        yield Call(name, "philox_normal", lambda s=seeds, n=shape, k=step: (torch.tensor(s), n, k))


@pytest.mark.parametrize("case", KERNEL_CASES)
def check_every_element(kernels, case):
    """Relative to itself, near zero to 1e-3: the tails are right, not the largest alone."""
    seeds, shape, step = KERNEL_CASES[case]
    seeds = torch.tensor(seeds)
    actual, expected = (f(seeds, shape, step) for f in (kernels.philox_normal, reference.philox_normal))
    error = (actual.double() - expected.double()).abs() / expected.double().abs().clamp_min(1e-3)
    assert error.max() <= 5e-7
    assert torch.equal(torch.ops.fastgen.philox_normal(seeds, shape, step)[0, :1].sign(), actual[0, :1].sign())


def check_equals_the_cpu_kernel(kernels):
    seeds = torch.arange(4)
    cpu = torch.ops.fastgen.philox_normal(seeds, (4, 3, 33), 5)
    torch.testing.assert_close(kernels.philox_normal(seeds, (4, 3, 33), 5), cpu, rtol=6e-7, atol=1e-9)


def check_nothing(kernels):
    assert kernels.philox_normal(torch.zeros(0).long(), (0, 5), 1).shape == (0, 5)


def check_reasons(kernels):
    seeds = torch.zeros(1).long()
    assert _dispatch.Triton.reasons("philox_normal", seeds, (2**31, 2), 0)
    assert _dispatch.Triton.reasons("philox_normal", seeds, (70000, 2), 0) == []
    found = _dispatch.Triton.reasons("philox_normal", torch.zeros(1), (1, 2), 0)
    assert found == ["seeds must be int64, got torch.float32"]


def gates(arch: int) -> Iterator[Call]:
    yield Call("normals", "philox_normal", lambda: (torch.zeros(2, dtype=torch.int64), (2, 4096), 1))
    yield Call("one normal", "philox_normal", lambda: (torch.zeros(1, dtype=torch.int64), (1, 1), 1))
    yield Call("normals, odd", "philox_normal", lambda: (torch.zeros(1, dtype=torch.int64), (1, 33), -1))


@pytest.mark.parametrize("shape", [(3, 1000), (2, 3, 65, 67), (1, 5), (4, 3, 64, 64)])
@pytest.mark.parametrize("step", [0, 7, -1])
def gpu_the_same_on_every_device_and_backend(shape, step):
    seeds = torch.tensor([1, -5, 2**40 + 3, 9][: shape[0]])
    cpu = philox_normal(seeds, shape, step)
    for backend in _dispatch.CUDA_BACKENDS:
        if not backend.reasons("philox_normal", seeds.cuda(), list(shape), step):
            gpu = backend.kernel("philox_normal")(seeds.cuda(), list(shape), step)
            torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-6, atol=1e-7)
