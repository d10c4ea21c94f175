"""The short way to apply an autograd Function: what `Function.apply` gives, and that itself where this torch has no short way."""

from typing import Any

import pytest
import torch

from fastgen.ops import _autograd, q_sample

from .q_sample_cases import tables


class Product(torch.autograd.Function):
    """x y and x + y, the second without a gradient; differentiable twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, y: torch.Tensor | None, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.ones_like(x) if y is None else y
        return factor * x * y, x + y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, y, ctx.factor = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y = ctx.saved_tensors
        by_y = None if y is None else ctx.factor * grad * x
        return ctx.factor * grad * (1 if y is None else y), by_y, None


def applied(x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    return _autograd.apply(Product, x, y, 3.0)[0]


def plain(x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    return 3.0 * x * (1.0 if y is None else y)


ARGUMENTS = torch.tensor([1.0, -2.0, 4.0]), torch.tensor([0.5, 3.0, -1.0])


@pytest.fixture(params=["short", "public"])
def way(request, monkeypatch):
    """The short way, which this torch must have, and the public one of a torch that has not."""
    if request.param == "short":
        assert _autograd._HAS_DIRECT
    else:
        monkeypatch.setattr(_autograd, "_HAS_DIRECT", False)
    return request.param


@pytest.mark.parametrize("second", [True, False])
def test_values_and_gradients(way, second):
    results = []
    for function in (applied, plain):
        x, y = (t.clone().requires_grad_() for t in ARGUMENTS)
        out = function(x, y if second else None)
        leaves = (x, y) if second else (x,)
        first = torch.autograd.grad((out * out).sum(), leaves, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append((out, *first, *twice))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_gradient_where_none_is_needed(way):
    assert not applied(*ARGUMENTS).requires_grad
    with torch.no_grad():
        assert not applied(ARGUMENTS[0].clone().requires_grad_(), None).requires_grad
    assert not _autograd.apply(Product, ARGUMENTS[0].clone().requires_grad_(), None, 1.0)[1].requires_grad


def test_transforms(way):
    x, y = (torch.stack([t, 2 * t]) for t in ARGUMENTS)
    for transform in (
        lambda f: torch.vmap(f),
        lambda f: torch.vmap(torch.func.grad(lambda a, b: f(a, b).sum())),
        lambda f: torch.vmap(torch.func.grad(lambda a, b: torch.func.grad(lambda c: f(c, b).square().sum())(a).sum())),
    ):
        assert torch.equal(transform(applied)(x, y), transform(plain)(x, y))


def test_compiled(way):
    results = []
    for function in (torch.compile(applied, backend="aot_eager", fullgraph=True), plain):
        x, y = (t.clone().requires_grad_() for t in ARGUMENTS)
        out = function(x, y)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, y))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_op_by_either_way(way):
    x0, noise = torch.randn(2, 3), torch.randn(2, 3)
    leaf = x0.clone().requires_grad_()
    q_sample(leaf, torch.tensor([1, 2]), *tables(), noise).sum().backward()
    assert torch.allclose(leaf.grad, tables()[0][[1, 2], None].float().expand(2, 3))


def test_what_is_missing_is_found_out(monkeypatch):
    """Without the private name, or where the private base takes other arguments, applies otherwise or does not apply."""
    assert _autograd.direct_apply_works()
    with monkeypatch.context() as patch:
        patch.delattr(torch._C, "_are_functorch_transforms_active")
        assert not _autograd.direct_apply_works()

    def fails(*_: Any) -> None:
        raise TypeError("apply() takes other arguments")

    for direct in (fails, lambda function, x: function.forward(x), lambda function, x: None):
        with monkeypatch.context() as patch:
            patch.setattr(_autograd, "_direct_apply", direct)
            assert not _autograd.direct_apply_works()


def test_the_long_way_where_torch_does_not_say_whether_a_transform_is_on(monkeypatch):
    monkeypatch.setattr(_autograd, "transforms_active", lambda: True)
    monkeypatch.setattr(_autograd, "_direct_apply", lambda *_: pytest.fail("the short way"))
    assert torch.equal(applied(*ARGUMENTS), plain(*ARGUMENTS))
