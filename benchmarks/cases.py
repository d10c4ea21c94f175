"""What a benchmark case is: a family, a mode, a shape, a layout and a dtype, and the providers that compete on it.

A `bench_*.py` file offers `cases(device, full) -> list[Case]`; a case builds its tensors only when its turn comes.
Files are found by their names: a new one needs no entry anywhere.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .verify import Expectation

FOLDER = Path(__file__).resolve().parent

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Role = Literal["fastgen", "baseline", "floor"]

# How a case calls fastgen: as any program does, as if for the first time in a process, or with noise drawn in the kernel.
AS_USED, FIRST, WITH_SEEDS = "as used", "first in a process", "with seeds"


@dataclass(frozen=True)
class Provider:
    """One competitor. ``call`` is what a round times, and its result what is checked before.

    A floor is a limit of the machine, not a competitor, and is not checked. ``expected`` replaces the workload's own where this
    provider must return something else (it draws noise of its own). ``times`` calls make what the others do in one: one is timed,
    its time multiplied, and the row says so.
    """

    name: str
    call: Callable[[], Any]
    role: Role = "baseline"
    expected: tuple[Expectation, ...] = ()
    times: int = 1


class SetUp(NamedTuple):
    """What a provider takes before its calls are as they stay: ``seconds``, and ``bytes`` that it keeps beside the model's own."""

    seconds: float
    bytes: int


@dataclass
class Workload:
    """A case with its tensors in memory.

    ``expected`` says what every provider's call must return (`verify.py` calls them and compares). ``min_bytes`` is the least
    traffic the mathematics allows (each input read once, each output written once), ``flops`` a nominal count, both for one call.
    ``notes`` says what could not be measured and why, ``set_up`` what the providers of that name took before their first call.
    """

    providers: list[Provider]
    expected: tuple[Expectation, ...]
    min_bytes: int
    flops: int
    grad: bool = False
    notes: list[str] = field(default_factory=list)
    set_up: dict[str, SetUp] = field(default_factory=dict)

    def grad_mode(self) -> AbstractContextManager:
        """In which the calls are checked and timed."""
        return torch.set_grad_enabled(self.grad)


@dataclass(frozen=True)
class Case:
    """The name of a measurement and how to set it up. ``build(allow_compile)`` makes the tensors and the providers.

    ``group`` names, in words, the rows whose mean means something; ``how`` the way fastgen is called.
    """

    family: str
    mode: str
    shape: tuple[int, ...]
    dtype: str
    build: Callable[[bool], Workload] = field(compare=False)
    group: str
    how: str = AS_USED
    layout: str = "NCHW"
    clock: Literal["device", "host"] = "device"  # host: what one call costs the Python thread, on any device

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def id(self) -> str:
        mode = self.mode if self.how == AS_USED else f"{self.mode}, {self.how}"
        return f"{self.family}/{mode}/{self.shape_text}/{self.layout}/{self.dtype}"


def modules() -> list[str]:
    """Every `bench_*.py` below this folder, as a module's name, by folder and name."""
    paths = sorted(FOLDER.glob("*/bench_*.py"))
    return [".".join((FOLDER.name, *path.relative_to(FOLDER).with_suffix("").parts)) for path in paths]


def collect(
    device: torch.device, full: bool, pattern: str | None = None, families: Sequence[str] | None = None
) -> tuple[dict[str, list[Case]], list[str]]:
    """The cases by family, those whose id matches ``pattern``, and a line for each module that cannot run here.

    Small families come first: what they leave of their time goes to the large. On a GPU `group_norm` comes before all: the figure
    wanted most, should the time end early.

    Raises:
        ValueError: a name in ``families`` that is none; the message lists those there are.
    """
    found: dict[str, list[Case]] = {}
    notes: list[str] = []
    for name in modules():
        try:
            module = importlib.import_module(name)
            listed = module.cases(device, full)
        except ImportError as error:
            notes.append(f"{name} is left out: {error}")
            continue
        for case in listed:
            found.setdefault(case.family, []).append(case)
    known = sorted(found)
    if unknown := sorted(set(families or ()) - set(known)):
        raise ValueError(f"no such family: {', '.join(unknown)}; there are {', '.join(known)}")
    order = sorted(known, key=lambda name: (device.type != "cuda" or name != "group_norm", len(found[name]), name))
    chosen = {
        family: [case for case in found[family] if pattern is None or re.search(pattern, case.id)]
        for family in order
        if not families or family in families
    }
    return {family: listed for family, listed in chosen.items() if listed}, notes


def random_tensor(
    shape: Sequence[int],
    device: torch.device,
    dtype: str,
    seed: int,
    *,
    layout: str = "NCHW",
    mean: float = 0.0,
    deviation: float = 1.0,
) -> Tensor:
    """Normal random data, never zeros; the same for the same seed, on every device."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(tuple(shape), generator=generator) * deviation + mean
    tensor = tensor.to(device=device, dtype=DTYPES[dtype])
    return tensor.contiguous(memory_format=torch.channels_last) if layout == "NHWC" else tensor


def start_compiler() -> None:
    """Have torch.compile set itself up: where it has never run that takes half a minute (it precompiles a header and tries what the
    processor can do), which is no case's."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(64))
    except Exception:  # :func:`compiled` says why, case by case
        return


def compiled(
    function: Callable[..., Any], inputs: Sequence[Any], allow: bool, notes: list[str], *, grad: bool = False
) -> Callable[..., Any] | None:
    """``torch.compile`` in its default mode, compiled now and for exactly these inputs, the backward too if ``grad``.

    Where it cannot be had the answer is None and ``notes`` says why; it never falls back to eager silently.
    """
    if not allow:
        notes.append("compile is not measured: switched off, or the family's time for it is spent")
        return None
    torch._dynamo.reset()  # else many shapes of one function hit the recompilation limit
    try:
        result = torch.compile(function, dynamic=False, fullgraph=True)
        with torch.set_grad_enabled(grad):
            output = result(*inputs)
            if grad:
                wanted = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.requires_grad]
                outputs = (output,) if isinstance(output, Tensor) else output
                torch.autograd.grad(outputs, wanted, [torch.ones_like(t) for t in outputs])
    except Exception as error:  # no compiler, say: the case goes on without this baseline
        notes.append(f"compile is not measured: {type(error).__name__}: {first_line(error)}")
        return None
    return result


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to a length that fits a table."""
    text = str(error).strip().splitlines()
    return text[0][:200] if text else ""
