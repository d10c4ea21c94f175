"""Gradients of `sampler_step`: of every tensor, of all at once, of their own dtype, and second ones."""

import pytest
import torch

from fastgen.ops import sampler_step

from .numerics import DTYPES, randn
from .sampler_step_cases import STEP, TENSORS, by_reference, make, make_table

GRADIENTS = (*TENSORS, "history 0", "history 1")


def as_function(chosen: list[str], names, layout: str, second: bool = True):
    """`sampler_step` in float64 as a function of some of its tensors, and their values."""
    shape = (2, 2, 1, 2)
    arguments = make(names, [torch.float64], [layout], shape)
    flat = {name: t for name, t in arguments.items() if name not in ("history", "seeds")}
    flat |= {f"history {k}": h for k, h in enumerate(arguments.get("history", ()))}

    def function(*values):
        every = {**flat, **dict(zip(chosen, values, strict=True))}
        history = [every.pop(name) for name in sorted(every) if name.startswith("history")]
        return sampler_step(
            **every,
            history=history,
            seeds=arguments.get("seeds"),
            table=make_table(),
            step=STEP,
            return_prediction=second,
        )

    # dense copies: gradcheck perturbs its inputs in place
    return function, tuple(flat[name].clone().requires_grad_() for name in chosen)


FULL = ("uncond", "noise", "variance", "mask", "known", "known_noise", "history 2")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck_one_at_a_time(name, layout):
    function, values = as_function([name], FULL, layout)
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("second", [True, False])
def test_gradcheck_all_at_once(second):
    function, values = as_function(list(GRADIENTS), FULL, "contiguous", second)
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


def test_gradcheck_of_seeds():
    names = ["sample", "model_output", "variance"]
    function, values = as_function(names, ("seeds", "variance"), "contiguous")
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


def test_gradient_of_a_broadcast_mask():
    arguments = make(("known",), [torch.float64], ["contiguous"], (2, 3, 2, 2))
    mask = randn(1, 1, 2, 2, seed=5).sigmoid().requires_grad_()
    function = lambda m: sampler_step(**arguments, mask=m, table=make_table(), step=STEP)  # noqa: E731
    assert torch.autograd.gradcheck(function, (mask,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtype_of_their_tensor(dtype):
    arguments = make(FULL[:-1], [dtype, torch.float32], ["contiguous"])
    leaves = {name: t.clone().requires_grad_() for name, t in arguments.items()}
    sampler_step(**leaves, table=make_table(), step=STEP).double().square().sum().backward()
    exact = {name: t.double().requires_grad_() for name, t in arguments.items()}
    by_reference(exact, make_table(), STEP, False)[0].square().sum().backward()
    tolerance = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype, name
        largest = exact[name].grad.abs().max()
        assert (leaf.grad.double() - exact[name].grad).abs().max() <= tolerance * largest, name


def test_no_gradient_is_made_where_none_is_asked():
    arguments = make((), [torch.float32], ["contiguous"])
    arguments["sample"].requires_grad_()
    assert sampler_step(**arguments, table=make_table(), step=STEP).requires_grad
    with torch.no_grad():
        assert not sampler_step(**arguments, table=make_table(), step=STEP).requires_grad
