"""The ops under `torch.func` and `torch.export`: mapped over a further dimension, differentiated there, exported for any batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import _schema
from fastgen.ops import diffusion_loss, group_norm, philox_normal, q_sample, sampler_step

from . import diffusion_loss_cases, q_sample_cases, sampler_step_cases
from .families import case_files
from .numerics import randn

FAMILIES = case_files()
COPIES = 3
SHAPE = (2, 4, 5, 7)
TABLE = sampler_step_cases.make_table()
TABLES = q_sample_cases.tables()
LOSS_TABLES = diffusion_loss_cases.tables(torch.float32)
DIFFERENTIABLE = [family for family in FAMILIES if family != "philox_normal"]

# Family -> (function of the tensors that may be mapped, those tensors for some seed): the main one comes first.
MAPPED: dict[str, tuple[Callable[..., Any], Callable[[int], list[Tensor]]]] = {
    "group_norm": (
        lambda x, weight, shift: group_norm(x, 2, weight, shift=shift, activation="silu"),
        lambda k: [randn(*SHAPE, seed=k).float(), randn(4, seed=k + 50).float(), randn(2, 4, seed=k + 60).float()],
    ),
    "sampler_step": (
        lambda x, model, h, noise, threshold: sampler_step(
            x, model, TABLE, 1, history=[h, x], noise=noise, threshold=threshold
        ),
        lambda k: [randn(*SHAPE, seed=k + 10 * i).float() for i in range(4)] + [1 + randn(2, seed=k + 80).abs()],
    ),
    "q_sample": (
        lambda x, noise, t: q_sample(x, t, *TABLES, noise, return_target="v_prediction"),
        lambda k: [randn(*SHAPE, seed=k).float(), randn(*SHAPE, seed=k + 30).float(), torch.tensor([k, k + 4])],
    ),
    "diffusion_loss": (
        lambda model, x0, noise, t: diffusion_loss(model, x0, noise, t, **LOSS_TABLES, vlb_weight=0.5),
        lambda k: [
            randn(2, 8, 5, 7, seed=k).tanh().float(),
            randn(*SHAPE, seed=k + 20).tanh().float(),
            randn(*SHAPE, seed=k + 40).float(),
            torch.tensor([k, 0]),
        ],
    ),
    "philox_normal": (lambda seeds: philox_normal(seeds, (2, 3, 5), 4), lambda k: [torch.tensor([k, -k])]),
}


def total(outputs: Any) -> Tensor:
    return outputs.sum() if isinstance(outputs, Tensor) else sum((i + 1) * o.sum() for i, o in enumerate(outputs))


def check_map(function: Callable[..., Any], family: str, mapped: tuple[bool, ...], dim: int = 0) -> None:
    """`vmap` of ``function`` against a loop, over those of the tensors that are ``mapped``."""
    rows = [MAPPED[family][1](k) for k in range(COPIES)]
    arguments = [torch.stack([row[i] for row in rows], dim) if over else rows[0][i] for i, over in enumerate(mapped)]
    actual = torch.vmap(function, in_dims=tuple(dim if over else None for over in mapped))(*arguments)
    each = [function(*(row[i] if over else rows[0][i] for i, over in enumerate(mapped))) for row in rows]
    if isinstance(actual, Tensor):
        actual, each = (actual,), [(e,) for e in each]
    for i, stacked in enumerate(actual):
        assert torch.equal(stacked, torch.stack([e[i] for e in each]))


def choices(family: str) -> list[tuple[bool, ...]]:
    """All tensors mapped, and each alone."""
    count = len(MAPPED[family][1](0))
    return [(True,) * count, *(tuple(i == k for i in range(count)) for k in range(count))]


def test_every_family_is_mapped():
    assert set(MAPPED) == set(_schema.SCHEMAS)


@pytest.mark.isa
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_vmap(family, dim):
    for mapped in choices(family):
        check_map(MAPPED[family][0], family, mapped, dim)


@pytest.mark.isa
@pytest.mark.parametrize("family", DIFFERENTIABLE)
def test_vmap_over_gradients(family):
    """Gradients of every sample of a further dimension: `vmap` of `grad`, by every input that it has one in."""
    for mapped in choices(family):
        check_map(torch.func.grad(lambda *a: total(MAPPED[family][0](*a))), family, mapped)


@pytest.mark.parametrize("family", ["sampler_step", "q_sample"])
def test_vmap_over_second_gradients(family):
    def norm(*arguments):
        return torch.func.grad(lambda *a: total(MAPPED[family][0](*a)))(*arguments).square().sum()

    check_map(torch.func.grad(norm), family, choices(family)[0])


@pytest.mark.parametrize("family", DIFFERENTIABLE)
def test_jacobian(family):
    """`jacrev` maps the backward over the rows of the identity."""
    function, make = MAPPED[family]
    main, *rest = (t.double() if t.is_floating_point() else t for t in make(1))
    direction = randn(*main.shape, seed=99)
    jacobian = torch.func.jacrev(lambda x: total_rows(function(x, *rest)))(main)
    along = torch.func.vjp(lambda x: total_rows(function(x, *rest)), main)[1](torch.ones(jacobian.shape[0]).double())[0]
    torch.testing.assert_close((jacobian * direction).sum(), (along * direction).sum())


def total_rows(outputs: Any) -> Tensor:
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    return first.reshape(-1)[:5]


def test_gradients_of_single_samples():
    """What the docstring of `diffusion_loss` promises: one gradient a sample, each as if it were alone in its batch."""
    function, make = MAPPED["diffusion_loss"]
    rows = [[t[:1] for t in make(k)] for k in range(COPIES)]
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    gradients = torch.vmap(torch.func.grad(function))(*stacked)
    for row, gradient in zip(rows, gradients, strict=True):
        assert torch.equal(gradient, torch.func.grad(function)(*row))


def test_maps_within_maps():
    function, make = MAPPED["sampler_step"]
    rows = [[make(2 * j + k) for k in range(2)] for j in range(COPIES)]
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


# Function of tensors whose first dimension is the batch, and those tensors for a batch of n.
EXPORTED: dict[str, tuple[Callable[..., Any], Callable[[int], list[Tensor]]]] = {
    "group_norm": (
        lambda x, shift: group_norm(x, 2, shift=shift, activation="silu"),
        lambda n: [randn(n, *SHAPE[1:]).float(), randn(n, 4).float()],
    ),
    "sampler_step": (
        lambda x, model, h, noise, threshold: sampler_step(
            x, model, TABLE, 1, history=[h], noise=noise, threshold=threshold,
            return_prediction=True,
        ),
        lambda n: [randn(n, *SHAPE[1:], seed=i).float() for i in range(4)] + [1 + randn(n).abs()],
    ),
    "sampler_step of seeds": (
        lambda x, model, seeds: sampler_step(x, model, TABLE, 1, seeds=seeds),
        lambda n: [randn(n, *SHAPE[1:], seed=i).float() for i in range(2)] + [torch.arange(n)],
    ),
    "q_sample": (
        lambda x, noise, t: q_sample(x, t, *TABLES, noise, return_target="sample"),
        lambda n: [randn(n, *SHAPE[1:], seed=i).float() for i in range(2)] + [torch.arange(n) % 7],
    ),
    "q_sample of seeds": (
        lambda x, seeds, t: q_sample(x, t, *TABLES, seeds=seeds),
        lambda n: [randn(n, *SHAPE[1:]).float(), torch.arange(n), torch.arange(n) % 7],
    ),
    "diffusion_loss": (
        lambda model, x0, noise, t: diffusion_loss(model, x0, noise, t, **LOSS_TABLES),
        lambda n: [randn(n, 8, 5, 7).float(), *(randn(n, 4, 5, 7, seed=i).float() for i in (1, 2)), torch.arange(n) % 7],
    ),
    "philox_normal": (
        lambda seeds: philox_normal(seeds, (seeds.shape[0], 3, 5), 2),
        lambda n: [torch.arange(n) * 2**40],
    ),
}  # fmt: skip


def test_every_family_is_exported():
    assert {name.split()[0] for name in EXPORTED} == set(_schema.SCHEMAS)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
def test_export_with_any_batch(name, strict):
    function, make = EXPORTED[name]
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


@pytest.mark.parametrize("family", ["philox_normal", "q_sample", "sampler_step"])
def test_a_counting_step_compiles_once(family):
    """A loop that counts its steps up does not compile each anew."""
    x, seeds, t = randn(2, 3, 4, 4).float(), torch.arange(2), torch.tensor([1, 2])
    table = sampler_step_cases.make_table(torch.float32).repeat(3, 1)
    functions = {
        "philox_normal": lambda step: philox_normal(seeds, (2, 3), step),
        "q_sample": lambda step: q_sample(x, t, *TABLES, seeds=seeds, step=step),
        "sampler_step": lambda step: sampler_step(x, x, table, step, seeds=seeds),
    }
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    compiled = torch.compile(functions[family], backend=backend, fullgraph=True)
    for step in range(2, 9):
        assert torch.equal(compiled(step), functions[family](step))
    assert len(graphs) <= 2  # once for the first, once for any other
