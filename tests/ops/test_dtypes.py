"""The one policy for dtypes, in every family and on every device: float8 is computed with a float32 copy, integers are refused."""

import warnings

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

import fastgen
from fastgen import _dispatch

from ..backends import requires_cuda
from .families import case_files

pytestmark = pytest.mark.filterwarnings("ignore:.*float32 copy:UserWarning")
FAMILIES = case_files()
FOREIGN = (torch.float8_e4m3fn, torch.float8_e5m2)
DEVICES = ("cpu", pytest.param("cuda", marks=[requires_cuda, pytest.mark.gpu]))


def floating(family: str) -> list[str]:
    """The arguments of the family's example that follow its dtype, the main one first."""
    example = FAMILIES[family].example(torch.bfloat16)
    return [name for name, value in example.items() if any(is_bfloat16(leaf) for leaf in tree_flatten(value)[0])]


def is_bfloat16(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


# whose results are float32, or levels, whatever goes in
OF_STATISTICS = ("categorical_sample", "diffusion_loss", "group_norm_affine", "logistic_mixture")
# Family -> positions of the outputs that are float32 whatever goes in.
OWN_DTYPE = {family: getattr(module, "OWN_DTYPE", ()) for family, module in FAMILIES.items()}
ARGUMENTS = [(family, name) for family in FAMILIES for name in floating(family)]


def cast(value, dtype):
    return tree_map_only(Tensor, lambda t: t.to(dtype), value)


def results(family: str, arguments: dict) -> list[Tensor]:
    return tree_flatten(getattr(fastgen.ops, family)(**arguments))[0]


@pytest.mark.isa
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FOREIGN)
@pytest.mark.parametrize(("family", "name"), ARGUMENTS)
def test_a_foreign_dtype_is_computed_in_float32_with_one_warning(family, name, dtype, device):
    example = tree_map_only(Tensor, lambda t: t.to(device), FAMILIES[family].example(torch.float32))
    arguments = {**example, name: cast(example[name], dtype)}
    expected = results(family, {**example, name: cast(arguments[name], torch.float32)})
    _dispatch.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            actual = results(family, arguments)
    assert [str(w.message) for w in said] == [
        f"fastgen: {family} computes with a float32 copy: no kernel takes {dtype}"
    ]
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        rounds = name == floating(family)[0] and family not in OF_STATISTICS and i not in OWN_DTYPE[family]
        assert a.dtype == (dtype if rounds else e.dtype) and a.stride() == e.stride()
        assert torch.equal(a.float(), e.to(a.dtype).float())


@pytest.mark.parametrize(("family", "name"), ARGUMENTS)
def test_an_integer_dtype_is_an_error_that_names_the_argument(family, name):
    example = FAMILIES[family].example(torch.float32)
    with pytest.raises(TypeError, match=rf"{family}: {name}(\[0\])? must .*floating-point.* got torch.int64"):
        results(family, {**example, name: cast(example[name], torch.int64)})


@pytest.mark.parametrize("family", [f for f in dict(ARGUMENTS) if not hasattr(FAMILIES[f], "NO_GRADIENT")])
def test_gradients_pass_through_the_copies(family):
    main = floating(family)[0]
    example = FAMILIES[family].example(torch.float32)
    example[main] = example[main].to(torch.float8_e5m2)
    leaf = example[main].clone().requires_grad_()
    wide = example[main].float().requires_grad_()
    for value in (leaf, wide):
        sum(r.float().sum() for r in results(family, {**example, main: value})).backward()
    assert leaf.grad.dtype == torch.float8_e5m2 and leaf.grad.float().abs().sum() > 0
    if family == "diffusion_loss":  # the others round their outputs, and so the gradients that arrive
        assert torch.equal(leaf.grad.float(), wide.grad.to(torch.float8_e5m2).float())


def test_every_family_has_an_example():
    assert set(FAMILIES) == set(fastgen._schema.SCHEMAS)
    assert {family for family, _ in ARGUMENTS} == set(FAMILIES) - {
        "philox_normal",
        "generator_normal",
    }  # which read no floats


def test_a_step_into_memory_of_a_foreign_dtype():
    example = FAMILIES["sampler_step"].example(torch.float8_e4m3fn)
    expected = results("sampler_step", example)
    out = [torch.zeros_like(t) for t in expected]
    fastgen.ops.sampler_step(**example, out=out)
    assert all(torch.equal(a.float(), e.float()) for a, e in zip(out, expected, strict=True))


@pytest.mark.parametrize("dtype", FOREIGN)
def test_normals_are_cast_to_any_floating_dtype(dtype):
    normals = fastgen.ops.philox_normal([1, 2], (2, 5), dtype=dtype)
    assert torch.equal(normals.float(), fastgen.ops.philox_normal([1, 2], (2, 5)).to(dtype).float())


def test_under_the_compiler():
    example = FAMILIES["q_sample"].example(torch.float8_e5m2)
    compiled = torch.compile(lambda kwargs: fastgen.ops.q_sample(**kwargs), backend="aot_eager", fullgraph=True)
    for a, e in zip(compiled(example), results("q_sample", example), strict=True):
        assert a.dtype == torch.float8_e5m2 and torch.equal(a.float(), e.float())
