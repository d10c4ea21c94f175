"""`generator_normal`: the numbers of `torch.randn` from CPU generators, drawn on all threads.

The kernel answers where it has been seen to agree with this torch, numbers and states; `torch.randn` itself wherever it has not.
"""

import functools
import math
import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _dispatch
from ._check import fail
from ._watchers import watched

_CPU = torch.device("cpu")
Generators = torch.Generator | Sequence[torch.Generator] | None

# Normals a draw below which torch draws: to read, pass and set a state takes as long as torch takes for some 4,000 (EPYC, AVX2).
LEAST = 4096


def generator_normal(
    shape: Sequence[int],
    generator: Generators = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""What ``torch.randn(shape, generator=generator, dtype=dtype)`` returns, several times as fast; and every generator is left
    as torch leaves it, bit for bit, so that draws of both may follow one another in any order.

    torch takes a uniform for every element from MT19937 and makes normals of blocks of 16, element j and j + 8 by the Box-Muller
    transform :math:`\sqrt{-2\ln(1-u)}\,(\cos 2\pi v, \sin 2\pi v)`. Every number is within 4 units in its last place of torch's
    (of 2^-16, where it is smaller); in float32, with AVX2 or better, both have the same bits. Before the first draw of a dtype
    numbers and states are compared: where they differ (another torch), for fewer than 4,096 numbers a generator, on a GPU and
    under the compiler torch draws.

    Calls of this function in several threads wait for each other. A thread that meanwhile draws by torch itself from the same
    generator is noticed, and the draw repeated, for torch's default generator; another generator belongs to one thread at a time.

    Args:
        shape: [N, *].
        generator: None (torch's default one), one for all, or a list of one a sample (a list of one counts as one), drawn from in
            order. What comes of a list is what diffusers' `randn_tensor` returns.
        dtype: of the result; others than float64, float32, bfloat16 and float16 are torch's to draw or refuse.
        device: of the result; a CPU generator draws on the CPU and the result is moved, no generator is that device's.

    Returns:
        Contiguous [N, *].

    Raises:
        TypeError: generator is no generator nor a list of them.
        ValueError: the list has another length than N, or a CUDA generator is to make a CPU tensor.

    Source: Matsumoto and Nishimura, "Mersenne Twister", ACM TOMACS 8, 1998.
    """
    shape, device = tuple(shape), torch.device(device)
    generators, source = _sources(shape, generator, device)
    enough = LEAST * len(generators) if generators else LEAST
    if source.type == "cpu" and not watched() and math.prod(shape) >= enough and not reasons(dtype):
        if len(generators) > 1:
            normals = _draw_each(shape, generators, dtype)
        else:
            normals = _draw(shape, generators[0] if generators else torch.default_generator, dtype)
    elif len(generators) > 1:
        normals = torch.cat([torch.randn((1, *shape[1:]), generator=g, device=source, dtype=dtype) for g in generators])
    else:
        only = generators[0] if generators else None
        normals = torch.randn(shape, generator=only, device=source, dtype=dtype)
    return normals if source == device else normals.to(device)


def reasons(dtype: torch.dtype | None = None) -> list[str]:
    """Why torch draws normals of ``dtype``, or of some dtype, on the CPU: no kernel, or one that does not agree with this torch."""
    if dtype is not None:
        return _verdict(dtype)[0]
    return list(dict.fromkeys(why for each in _dispatch.KERNEL_DTYPES for why in reasons(each)))


def _sources(
    shape: tuple[int, ...], generator: Generators, device: torch.device
) -> tuple[Sequence[torch.Generator], torch.device]:
    """The generators of a draw, none for the default one of the device; and the device that they draw on."""
    if generator is None:
        return (), device
    if isinstance(generator, torch.Generator) and generator.device.type == "cpu":  # the usual one, at once
        return (generator,), _CPU
    generators = (generator,) if isinstance(generator, torch.Generator) else generator
    if not isinstance(generators, Sequence) or not all([isinstance(g, torch.Generator) for g in generators]):
        raise TypeError(f"generator_normal: generator must be a torch.Generator or a list of them, got {generator!r}")
    samples = shape[0] if shape else 1
    if len(generators) not in (1, samples) or not generators:
        fail("generator_normal", f"generator must be one, or one a sample ({samples}), got {len(generators)}")
    kinds = {g.device.type for g in generators}
    if kinds == {"cpu"}:
        return generators, _CPU
    if kinds != {device.type}:
        found = ", ".join(str(g.device) for g in generators)
        fail("generator_normal", f"generator must be on the CPU or on {device}, all on one, got {found}")
    return generators, device


def _kernel(states: Tensor, shape: tuple[int, ...], dtype: torch.dtype, wide_angle: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.fastgen.generator_normal.default(states, shape, dtype, wide_angle)


_lock = threading.Lock()  # from reading a state to setting it


def _renew_lock() -> None:
    """In a forked child, whose lock another thread of the parent may have held."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """By the kernel, from one generator."""
    wide_angle = _verdict(dtype)[1]
    with _lock:
        while True:
            state = generator.get_state()
            normals, after = _kernel(state, shape, dtype, wide_angle)
            if generator is not torch.default_generator or torch.equal(generator.get_state(), state):
                generator.set_state(after)
                return normals


def _draw_each(shape: tuple[int, ...], generators: Sequence[torch.Generator], dtype: torch.dtype) -> Tensor:
    """By the kernel, from one generator a sample."""
    if len(set(generators)) < len(generators):
        # In order: the second draw from a generator begins where the first has ended.
        return torch.cat([_draw((1, *shape[1:]), g, dtype) for g in generators])
    with _lock:
        states = torch.stack([g.get_state() for g in generators])
        normals, after = _kernel(states, shape, dtype, _verdict(dtype)[1])
        for g, state in zip(generators, after.unbind(), strict=True):
            g.set_state(state.clone())  # of a view that begins further on torch reads the wrong bytes
    return normals


@functools.cache
def _verdict(dtype: torch.dtype) -> tuple[list[str], bool]:
    """Reasons against the kernel, and whether torch rounds angles in its scalar code: by drawing with both, once a dtype.

    torch's kernels for AVX2 round the angles of float32 as a product of floats, its others as one of doubles; the low-precision
    dtypes are rounded float32.
    """
    against = _dispatch.cpu_reasons(torch.empty(0, dtype=dtype))
    if against:
        return against, False
    try:
        wide_angle = min((False, True), key=lambda wide: _distance(torch.float32, wide))
        distance = _distance(dtype, wide_angle)
    except RuntimeError as error:
        return [f"the kernel cannot read the generators of torch {torch.__version__}: {error}"], False
    if distance <= 4:
        return [], wide_angle
    found = f"{distance:.3g} units in the last place off" if distance < math.inf else "or leaves another state"
    return [
        f"torch {torch.__version__} draws other {str(dtype).removeprefix('torch.')} normals than the kernel, {found}"
    ], False


def _distance(dtype: torch.dtype, wide_angle: bool) -> float:
    """Of small draws by the kernel from those by torch, in units in the last place; infinite where a state differs."""
    worst = 0.0
    for drawn_before, count in ((0, 16), (5, 37), (619, 1300)):
        generator = torch.Generator("cpu").manual_seed(count)
        torch.rand(drawn_before, generator=generator, device="cpu")
        torch.randn(3, generator=generator, device="cpu")  # leaves a spare normal
        state = generator.get_state()
        expected = torch.randn(count, generator=generator, device="cpu", dtype=dtype).double()
        normals, after = _kernel(state, (count,), dtype, wide_angle)
        if not torch.equal(after, generator.get_state()):
            return math.inf
        unit = torch.finfo(dtype).eps * 2.0 ** expected.abs().clamp_min(2.0**-16).log2().floor()
        worst = max(worst, float(((normals.double() - expected).abs() / unit).nan_to_num(nan=math.inf).max()))
    return worst
