"""Arguments of `sampler_step` for its tests, and the comparison with the reference."""

import itertools
from typing import Any

import torch
from torch import Tensor

from fastgen.ops import COLUMNS, sampler_step
from fastgen.reference import sampler_step as reference
from fastgen.reference._layout import output_strides

from .numerics import assert_bar, place, poison_allocator, randn

TENSORS = ("sample", "model_output", "uncond", "noise", "variance", "mask", "known", "known_noise")
SHAPE = (2, 3, 5, 7)
STEP = 1
OPTIONS = {  # the optional arguments that make sense together
    "bare": (),
    "uncond": ("uncond",),
    "noise": ("noise",),
    "seeds": ("seeds",),
    "learned variance": ("noise", "variance"),
    "learned variance of seeds": ("seeds", "variance"),
    "inpainting": ("mask", "known"),
    "noised inpainting": ("mask", "known", "known_noise"),
    "history of 1": ("history 1",),
    "history of 2": ("history 2",),
    "history of 3": ("history 3",),
    "threshold": ("threshold",),
    "everything": ("uncond", "noise", "variance", "mask", "known", "known_noise", "threshold", "history 3"),
    "everything of seeds": ("uncond", "seeds", "variance", "mask", "known", "known_noise", "threshold", "history 2"),
}


def make_table(dtype: torch.dtype = torch.float64, history: int = 6, clip: float = 0.8, **columns: float) -> Tensor:
    """Three rows of coefficients of order one; another row than ``STEP`` gives another answer."""
    table = 0.4 + 0.5 * randn(3, len(COLUMNS) + history, seed=77).tanh()
    table[:, COLUMNS.index("clip_min")] = -clip
    table[:, COLUMNS.index("clip_max")] = clip
    table[:, COLUMNS.index("guidance_scale")] = 2.5
    for name, value in columns.items():
        table[:, COLUMNS.index(name)] = value
    return table.to(dtype)


def make(names, dtypes, layouts, shape=SHAPE) -> dict:
    """Arguments of `sampler_step` by keyword; ``dtypes`` and ``layouts`` are taken in turn, the sample first."""
    dtype, layout = itertools.cycle(dtypes), itertools.cycle(layouts)
    arguments = {}
    for i, name in enumerate(("sample", "model_output", *names)):
        if name == "seeds":
            arguments[name] = torch.tensor([2**40 + n if n % 2 else -n - 1 for n in range(shape[0])], dtype=torch.int64)
        elif name == "threshold":
            arguments[name] = place((1 + randn(2 * shape[0], seed=9).abs()).to(next(dtype)), "contiguous")[::2]
        elif name.startswith("history"):
            count = int(name.split()[1])
            arguments["history"] = [
                place(randn(*shape, seed=50 + k, dtype=next(dtype)), next(layout)) for k in range(count)
            ]
        else:
            value = randn(*shape, seed=i + 1)
            arguments[name] = place((value.sigmoid() if name == "mask" else value).to(next(dtype)), next(layout))
    return arguments


def raw(arguments: dict, table: Tensor, step: int, wanted: tuple) -> tuple:
    """The arguments in the order of the raw op; ``wanted`` ends them."""
    sample, model, uncond, noise, variance, mask, known, known_noise = (arguments.get(name) for name in TENSORS)
    history, seeds, threshold = list(arguments.get("history", ())), arguments.get("seeds"), arguments.get("threshold")
    inputs = (sample, model, table, step, uncond, history, noise, seeds, variance, mask, known, known_noise, threshold)
    return (*inputs, *wanted)


def by_reference(arguments: dict, table: Tensor, step: int, wide: bool) -> tuple[Tensor, ...]:
    """The reference on the same arguments, in float64 throughout where ``wide``; all three outputs."""
    if wide:
        arguments = {
            name: [h.double() for h in t] if name == "history" else t if name == "seeds" else t.double()
            for name, t in arguments.items()
        }
        table = table.double()
    return reference.sampler_step_fwd(*raw(arguments, table, step, (True, True)))


def check(arguments: dict, table: Tensor, step: int = STEP) -> None:
    sample = arguments["sample"]
    poison_allocator(sample.numel() * sample.element_size())
    actual = sampler_step(**arguments, table=table, step=step, return_prediction=True, return_corrected=True)
    beside, exact = by_reference(arguments, table, step, False), by_reference(arguments, table, step, True)
    # nothing is more exact than float64 to compare it with; a float32 row of coefficients may be lucky in plain torch. The
    # normals drawn in the kernel are themselves only good to a few units in the last place of float32
    slack = {torch.float64: 1e-14, torch.float32: 1.2e-7}.get(sample.dtype, 2e-7)
    if "seeds" in arguments:
        slack += 1e-6
    for a, b, e in zip(actual, beside, exact, strict=True):
        assert a.dtype == sample.dtype and list(a.stride()) == output_strides(sample)
        assert_bar(a, b, e, slack)
    alone = sampler_step(**arguments, table=table, step=step)
    assert isinstance(alone, Tensor) and torch.equal(alone, actual[0])


def example(dtype: torch.dtype) -> dict[str, Any]:
    arguments = make(OPTIONS["everything"], [dtype], ["contiguous"])
    return {**arguments, "table": make_table(), "step": STEP, "return_prediction": True, "return_corrected": True}
