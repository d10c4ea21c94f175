"""Raw ops called with anything: an argument too short, too long, of another rank, dtype or device is an error, never a crash.

What the public op hands down is recorded, family by family, and spoiled one tensor at a time: by kernel, reference and fake alike.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

import fastgen
from fastgen import _schema

from . import diffusion_loss_cases
from .families import case_files
from .numerics import randn

FAMILIES = case_files()


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every raw op that passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == _schema.NAMESPACE:
            self.calls.append((func._schema.name.split("::")[1], args))
        return func(*args, **(kwargs or {}))


def keywords(family: str) -> Iterator[dict[str, Any]]:
    """Arguments of the public op that between them give every tensor argument of its raw ops."""
    example = FAMILIES[family].example(torch.float32)
    yield example
    if "noise" in example and family != "diffusion_loss":
        seeds = {"seeds": torch.arange(len(example["noise"]))}
        yield {**example, "noise": None, **seeds}
    if family == "sampler_step":
        yield {**example, "out": [torch.empty_like(example["sample"]) for _ in range(3)]}
        yield {**example, "noise": None, **seeds, "out": [torch.empty_like(example["sample"]) for _ in range(3)]}
    if family == "diffusion_loss":
        yield {
            **example,
            "model_output": randn(3, 8, 5, 7, dtype=torch.float32),
            **diffusion_loss_cases.tables(torch.float32),
        }


def recorded_calls() -> dict[str, list[tuple]]:
    """Raw op -> what it was called with, with gradients and without."""
    calls: dict[str, list[tuple]] = {op: [] for op in _schema.FAMILY_OF}
    for family in FAMILIES:
        for named in keywords(family):
            main = next(
                (name for name, value in named.items() if isinstance(value, Tensor) and value.is_floating_point()), None
            )
            for gradients in (False, True) if main is not None and "out" not in named else (False,):
                given = {**named, main: named[main].clone().requires_grad_()} if gradients else named
                with Recorder() as recorder:
                    results = tree_flatten(getattr(fastgen.ops, family)(**given))[0]
                    if gradients:
                        sum(r.sum() for r in results).backward()
                for op, args in recorder.calls:
                    calls[op].append(tuple(a.detach() if isinstance(a, Tensor) else a for a in args))
    calls["group_norm_wide_fwd"] = calls["group_norm_fwd"]  # which CUDA autocast alone calls
    return calls


CALLS = recorded_calls()


def arguments(op: str) -> list[str]:
    return [a.name for a in getattr(torch.ops.fastgen, op).default._schema.arguments if "Tensor" in str(a.type)]


def call(op: str, args: tuple) -> Any:
    return getattr(torch.ops.fastgen, op).default(*args)


@pytest.mark.parametrize("op", CALLS)
def test_every_tensor_argument_is_recorded(op):
    schema = getattr(torch.ops.fastgen, op).default._schema
    given = {a.name for args in CALLS[op] for a, value in zip(schema.arguments, args, strict=True) if value is not None}
    assert set(arguments(op)) <= given


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"dimension {d} too short": lambda t, d=d: t.narrow(d, 0, t.shape[d] - 1) for d in range(4)},
    **{f"dimension {d} empty": lambda t, d=d: t.narrow(d, 0, 0) for d in range(4)},
    **{f"dimension {d} of one": lambda t, d=d: t.narrow(d, 0, 1) for d in range(4)},
    **{f"dimension {d} too long": lambda t, d=d: torch.cat([t, t], d) for d in range(4)},
    "a dimension more": lambda t: t[None],
    "a dimension less": lambda t: t[0],
    "a scalar": lambda t: t.flatten()[0],
    "integers": lambda t: t.long() if t.is_floating_point() else t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "the meta device": lambda t: t.to("meta"),
}


def harmless(op: str, name: str, how: str, args: tuple) -> bool:
    """Whether it still fits: a table may be longer than is read; a size or device that no other tensor tells may be any."""
    if op.startswith("sampler_step") and name == "table":
        return how.endswith("too long") or how == "dimension 0 too short"
    if op in ("group_norm", "group_norm_fwd", "group_norm_wide_fwd") and name == "input":
        return how.startswith(("dimension 2", "dimension 3"))
    if op == "q_sample_fwd" and name == "x0" and args[4] is None:  # without noise
        return how.startswith(("dimension 1", "dimension 2", "dimension 3", "a dimension less"))
    return op == "philox_normal" and how == "the meta device"


def spoiled(op: str) -> Iterator[tuple[str, str, tuple]]:
    """(argument, what is wrong with it, all arguments), one tensor at a time."""
    schema = getattr(torch.ops.fastgen, op).default._schema
    for args in CALLS[op]:
        leaves, tree = tree_flatten(args)
        names = [
            argument.name
            for argument, value in zip(schema.arguments, args, strict=True)
            for _ in (value if isinstance(value, list) else [value])
        ]
        for i, leaf in enumerate(leaves):
            for how, change in SPOILED.items():
                if not isinstance(leaf, Tensor) or (how.startswith("dimension") and int(how.split()[1]) >= leaf.dim()):
                    continue
                if (how.endswith("of one") and leaf.shape[int(how.split()[1])] == 1) or harmless(
                    op, names[i], how, args
                ):
                    continue
                yield names[i], how, tree_unflatten([*leaves[:i], change(leaf), *leaves[i + 1 :]], tree)


@pytest.mark.isa
@pytest.mark.parametrize("op", CALLS)
def test_a_spoiled_argument_is_refused(op):
    count = 0
    for name, how, args in spoiled(op):
        with pytest.raises((RuntimeError, NotImplementedError), match=_schema.FAMILY_OF[op]):
            call(op, args)
            pytest.fail(f"{op} took {name} with {how}")
        count += 1
    assert count >= 8


@pytest.mark.parametrize("op", CALLS)
def test_the_fake_refuses_it_too(op):
    for name, how, args in spoiled(op):
        leaves, tree = tree_flatten(args)
        faked = tree_unflatten([v.to("meta") if isinstance(v, Tensor) else v for v in leaves], tree)
        if how == "the meta device":
            continue
        with pytest.raises(RuntimeError, match=_schema.FAMILY_OF[op]):
            call(op, faked)
            pytest.fail(f"the fake of {op} took {name} with {how}")


@pytest.mark.isa
@pytest.mark.parametrize("op", CALLS)
def test_what_was_recorded_is_taken(op):
    for args in CALLS[op]:
        call(op, args)


# An argument that is no tensor: (op, its name, a value).
NUMBERS = [
    ("sampler_step_fwd", "step", 3),
    ("sampler_step_fwd", "step", -1),
    ("sampler_step_out", "step", 2**40),
    ("q_sample_fwd", "target", 4),
    ("q_sample_fwd", "target", -2),
    ("q_sample_bwd", "target", 4),
    ("diffusion_loss_fwd", "prediction", 4),
    ("diffusion_loss_bwd", "prediction", -1),
    ("group_norm", "num_groups", 0),
    ("group_norm_fwd", "num_groups", -3),
    ("group_norm_bwd", "num_groups", 4),
    ("group_norm_fwd", "activation", 2),
    ("group_norm_bwd", "activation", -1),
    ("philox_normal", "shape", [3, 5]),
    ("philox_normal", "shape", [2, -1]),
    ("philox_normal", "shape", []),
    ("philox_normal", "shape", [2, 2**32, 2**32]),
]


@pytest.mark.isa
@pytest.mark.parametrize(("op", "name", "value"), NUMBERS)
def test_a_number_out_of_range_is_refused(op, name, value):
    schema = getattr(torch.ops.fastgen, op).default._schema
    (place,) = (i for i, argument in enumerate(schema.arguments) if argument.name == name)
    for args in CALLS[op]:
        with pytest.raises(RuntimeError):
            call(op, (*args[:place], value, *args[place + 1 :]))


@pytest.mark.isa
@pytest.mark.parametrize("value", [-1, 20, 2**62, -(2**63)])
@pytest.mark.parametrize("op", [op for op in CALLS if "t" in arguments(op)])
def test_a_timestep_out_of_range_is_refused(op, value):
    place = arguments(op).index("t")
    for args in CALLS[op]:
        t = args[place].clone()
        t[-1] = value
        with pytest.raises(RuntimeError, match=rf"t must be in \[0, \d+\), got t\[{len(t) - 1}\] = {value}"):
            call(op, (*args[:place], t, *args[place + 1 :]))


@pytest.mark.isa
def test_no_message_names_a_file():
    """Of the kernels and of torch's own headers, a sample of each kind of message."""
    messages = []
    for op in CALLS:
        for _, _, args in spoiled(op):
            try:
                call(op, args)
            except (RuntimeError, NotImplementedError) as error:
                messages.append(str(error))
    assert len(messages) > 100
    here = str(fastgen.__file__).removesuffix("/fastgen/__init__.py")
    assert [m for m in messages if here in m or ".cpp" in m or ".h:" in m] == []
