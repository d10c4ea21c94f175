"""The ops under `torch.func` and `torch.export`: mapped over a further dimension, differentiated there, exported for any batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import _schema
from fastgen.ops import philox_normal

from .families import OfTensors, case_files
from .numerics import randn

FAMILIES = case_files()
COPIES = 3
MAPPED: dict[str, OfTensors] = {family: module.MAPPED for family, module in FAMILIES.items()}
DIFFERENTIABLE = [family for family, mapped in MAPPED.items() if mapped.make(0)[0].is_floating_point()]
EXPORTED = {name: exported for module in FAMILIES.values() for name, exported in module.EXPORTED.items()}
COUNTED = {family: module.counted for family, module in FAMILIES.items() if hasattr(module, "counted")}


def total(outputs: Any) -> Tensor:
    return outputs.sum() if isinstance(outputs, Tensor) else sum((i + 1) * o.sum() for i, o in enumerate(outputs))


def check_map(function: Callable[..., Any], family: str, mapped: tuple[bool, ...], dim: int = 0) -> None:
    """`vmap` of ``function`` against a loop, over those of the tensors that are ``mapped``."""
    rows = [MAPPED[family].make(k) for k in range(COPIES)]
    arguments = [torch.stack([row[i] for row in rows], dim) if over else rows[0][i] for i, over in enumerate(mapped)]
    actual = torch.vmap(function, in_dims=tuple(dim if over else None for over in mapped))(*arguments)
    each = [function(*(row[i] if over else rows[0][i] for i, over in enumerate(mapped))) for row in rows]
    if isinstance(actual, Tensor):
        actual, each = (actual,), [(e,) for e in each]
    for i, stacked in enumerate(actual):
        assert torch.equal(stacked, torch.stack([e[i] for e in each]))


def choices(family: str) -> list[tuple[bool, ...]]:
    """All tensors mapped, and each alone."""
    count = len(MAPPED[family].make(0))
    return [(True,) * count, *(tuple(i == k for i in range(count)) for k in range(count))]


@pytest.mark.isa
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_vmap(family, dim):
    for mapped in choices(family):
        check_map(MAPPED[family].function, family, mapped, dim)


@pytest.mark.isa
@pytest.mark.parametrize("family", DIFFERENTIABLE)
def test_vmap_over_gradients(family):
    """Gradients of every sample of a further dimension: `vmap` of `grad`, by every input that it has one in."""
    for mapped in choices(family):
        check_map(torch.func.grad(lambda *a: total(MAPPED[family].function(*a))), family, mapped)


@pytest.mark.parametrize("family", [family for family, module in FAMILIES.items() if hasattr(module, "TWICE")])
def test_vmap_over_second_gradients(family):
    def norm(*arguments):
        return torch.func.grad(lambda *a: total(MAPPED[family].function(*a)))(*arguments).square().sum()

    check_map(torch.func.grad(norm), family, choices(family)[0])


@pytest.mark.parametrize("family", DIFFERENTIABLE)
def test_jacobian(family):
    """`jacrev` maps the backward over the rows of the identity."""
    function = MAPPED[family].function
    main, *rest = (t.double() if t.is_floating_point() else t for t in MAPPED[family].make(1))
    direction = randn(*main.shape, seed=99)
    jacobian = torch.func.jacrev(lambda x: total_rows(function(x, *rest)))(main)
    along = torch.func.vjp(lambda x: total_rows(function(x, *rest)), main)[1](torch.ones(jacobian.shape[0]).double())[0]
    torch.testing.assert_close((jacobian * direction).sum(), (along * direction).sum())


def total_rows(outputs: Any) -> Tensor:
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    return first.reshape(-1)[:5]


def test_gradients_of_single_samples():
    """What the docstring of `diffusion_loss` promises: one gradient a sample, each as if it were alone in its batch."""
    function = MAPPED["diffusion_loss"].function
    rows = [[t[:1] for t in MAPPED["diffusion_loss"].make(k)] for k in range(COPIES)]
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    gradients = torch.vmap(torch.func.grad(function))(*stacked)
    for row, gradient in zip(rows, gradients, strict=True):
        assert torch.equal(gradient, torch.func.grad(function)(*row))


def test_maps_within_maps():
    function = MAPPED["sampler_step"].function
    rows = [[MAPPED["sampler_step"].make(2 * j + k) for k in range(2)] for j in range(COPIES)]
    stacked = [torch.stack([torch.stack([row[i] for row in pair]) for pair in rows]) for i in range(5)]
    actual = torch.vmap(torch.vmap(function))(*stacked)
    for j in range(COPIES):
        for k in range(2):
            assert torch.equal(actual[j, k], function(*rows[j][k]))


def test_a_map_over_nothing_says_so():
    with pytest.raises(RuntimeError, match="philox_normal: a vmap over a dimension of size 0"):
        torch.vmap(lambda seeds: philox_normal(seeds, (2, 3)))(torch.zeros(0, 2, dtype=torch.int64))


class Call(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Any:
        return self.function(*arguments)


def test_every_family_is_exported():
    assert {name.split()[0] for name in EXPORTED} == set(_schema.SCHEMAS)


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in EXPORTED), ("sampler_step", True)])
def test_export_with_any_batch(name, strict):
    function, make = EXPORTED[name].function, EXPORTED[name].make
    example = tuple(make(3))
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(
        Call(function), example, dynamic_shapes={"arguments": tuple({0: batch} for _ in example)}, strict=strict
    )
    for n in (3, 1, 8):
        arguments = make(n)
        actual, expected = program.module()(*arguments), function(*arguments)
        if isinstance(actual, Tensor):
            actual, expected = (actual,), (expected,)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e) and a.stride() == e.stride()


def test_export_with_any_size():
    """All of the shape of the normals may be symbolic."""
    height = torch.export.Dim("height", min=2, max=512)
    module = Call(lambda x, seeds: x + philox_normal(seeds, x.shape, 1))
    example = (torch.zeros(2, 3, 5, 7), torch.arange(2))
    program = torch.export.export(module, example, dynamic_shapes={"arguments": ({2: height}, None)})
    for h in (5, 11):
        expected = philox_normal([0, 1], (2, 3, h, 7), 1)
        assert torch.equal(program.module()(torch.zeros(2, 3, h, 7), torch.arange(2)), expected)


@pytest.mark.parametrize("family", COUNTED)
def test_a_counting_step_compiles_once(family):
    """A loop that counts its steps up does not compile each anew."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    compiled = torch.compile(COUNTED[family], backend=backend, fullgraph=True)
    for step in range(2, 9):
        assert torch.equal(compiled(step), COUNTED[family](step))
    assert len(graphs) <= 2  # once for the first, once for any other
