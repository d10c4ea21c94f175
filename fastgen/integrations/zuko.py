"""zuko: its masked autoregressive and coupling transformations, affine and spline, density and sampling.

A lazy transformation is a module that builds torch's transformations when it is called. What is accelerated are those that it
builds: they stay what they are, `isinstance` and all, and `meta`, which builds the transformation of each feature, too.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..flows import AffineMap, SplineMap
from ..ops import ScaleFn, affine_coupling, rational_quadratic_spline
from .conditioners import Describe, in_one, inverted, manner, masked_mlp
from .flow_layers import covered
from .stand_in import StandIn, put

PROJECT = "zuko"


class Elements(NamedTuple):
    """A transformation of each feature: affine, or a spline in [-bound, bound], circular where features are turned before it."""

    slope: float
    bins: int = 0  # 0: affine
    bound: float = 5.0
    circular: bool = False

    def __call__(
        self, x: Tensor, phi: Tensor, inverse: bool = False, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [N, D] by parameters [N, C' * P] of all features, or of C' of them: the output, and the log-det [N]."""
        if not self.bins:
            return affine_coupling(
                x, phi, scale_fn=self.scale_fn(), layout="interleaved", mask=features, inverse=inverse
            )
        x = x if inverse else self.turned(x, features)
        packed = phi.unflatten(1, (-1, 3 * self.bins - 1))
        y, log_det = rational_quadratic_spline(
            x,
            packed,
            bound=self.bound,
            min_derivative=self.slope,
            parametrization="zuko",
            mask=features,
            inverse=inverse,
        )
        return self.turned(y, features) if inverse else y, log_det

    def known(self) -> AffineMap | SplineMap | None:
        if not self.bins:
            return AffineMap.of(self.scale_fn(), shift_first=True)
        return SplineMap(
            self.bins, bound=self.bound, min_derivative=self.slope, parametrization="zuko", turn=self.circular
        )

    def scale_fn(self) -> ScaleFn:
        return ScaleFn("soft_clip", bound=-math.log(self.slope))

    def turned(self, x: Tensor, features: Tensor | None) -> Tensor:
        if not self.circular:
            return x
        turned = torch.remainder(x, 2 * self.bound) - self.bound
        if features is None:
            return turned
        return x.index_copy(1, features, turned.index_select(1, features))


def elements_of(layer: Any) -> Elements | None:
    """What the transformation of each feature is; None where it is another."""
    univariate: Any = layer.univariate
    given: dict[str, Any] = {}
    if isinstance(univariate, functools.partial) and not univariate.args:
        univariate, given = univariate.func, univariate.keywords
    try:
        return _elements(univariate, tuple(sorted(given.items())), tuple(tuple(shape) for shape in layer.shapes))
    except TypeError:  # something that has no hash
        return None


@functools.cache
def _elements(univariate: Callable[..., Any], given: tuple[Any, ...], shapes: tuple[Any, ...]) -> Elements | None:
    name, numbers = getattr(univariate, "__name__", ""), dict(given)
    if not str(getattr(univariate, "__module__", "")).startswith(PROJECT) or not set(numbers) <= {"slope", "bound"}:
        return None
    known = inspect.signature(univariate).parameters
    numbers = {n: numbers.get(n, known[n].default) for n in ("slope", "bound") if n in known}
    if name == "MonotonicAffineTransform" and shapes == ((), ()):
        made = Elements(**numbers)
    elif name in ("MonotonicRQSTransform", "CircularRQSTransform") and len(shapes) == 3 and len(shapes[0]) == 1:
        (bins,), circular = shapes[0], name.startswith("Circular")
        if shapes != ((bins,), (bins,), (bins - 1,)):
            return None
        made = Elements(**({"bound": math.pi} if circular else {}), **numbers, bins=bins, circular=circular)
    else:
        return None
    return made if _agrees(made, functools.partial(univariate, **dict(given)), shapes) else None


def _agrees(elements: Elements, univariate: Callable[..., Any], shapes: tuple[Any, ...]) -> bool:
    """Whether these are the numbers of theirs, which another version may compute otherwise."""
    sizes = [math.prod(shape) for shape in shapes]
    x = torch.linspace(-4, 4, 8, dtype=torch.float64)[:, None]
    phi = torch.linspace(-7, 7, 8 * sum(sizes), dtype=torch.float64).sin().reshape(8, -1) * 3
    parts = (part.reshape(8, 1, *shape) for part, shape in zip(phi.split(sizes, 1), shapes, strict=True))
    with torch.no_grad():
        y, log_det = elements(x, phi)
        try:
            theirs, of_theirs = univariate(*parts).call_and_ladj(x)
        except Exception:  # whatever it is, it is built otherwise
            return False
    return torch.allclose(y, theirs) and torch.allclose(log_det[:, None], of_theirs)


def unknown(layer: Any) -> Iterator[str]:
    if elements_of(layer) is None:
        univariate = layer.univariate
        univariate = univariate.func if isinstance(univariate, functools.partial) else univariate
        yield f"univariate transformation {getattr(univariate, '__name__', type(univariate).__name__)}"


class Transformation(StandIn):
    """What a lazy transformation has built; ``fused``, of the elements, the input, the context and the direction, is its op."""

    def _call(self: Any, x: Tensor) -> Tensor:
        found = self._fused(x, False)
        return self.of_theirs("_call")(x) if found is None else found[0]

    def _inverse(self: Any, y: Tensor) -> Tensor:
        found = self._fused(y, True)
        return self.of_theirs("_inverse")(y) if found is None else found[0]

    def log_abs_det_jacobian(self: Any, x: Tensor, y: Tensor) -> Tensor:
        found = self._fused(x, False)
        return self.of_theirs("log_abs_det_jacobian")(x, y) if found is None else found[1]

    def call_and_ladj(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self._fused(x, False)
        return self.of_theirs("call_and_ladj")(x) if found is None else found

    def _fused(self: Any, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        layer, context = built_by(self)
        elements = None if layer is None else elements_of(layer)
        if elements is None or not covered(x, *(() if context is None else (context,))) or x.dim() == 0:
            return None
        batch = x.shape[:-1] if context is None else torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
        rows = x.expand(*batch, -1).reshape(-1, x.shape[-1])
        if context is not None:
            context = context.expand(*batch, -1).reshape(len(rows), -1)
        y, log_det = self._fused_rows(layer, elements, rows, context, inverse)
        return y.reshape(*batch, -1), log_det.reshape(batch)


def built_by(transform: Any) -> tuple[Any, Tensor | None]:
    """The lazy transformation that built this one, and the context it was given; None where `meta` is something else by now."""
    meta = transform.meta
    layer: Any = getattr(getattr(meta, "func", None), "__self__", None)
    if (
        not isinstance(layer, StandIn)
        or meta.func.__func__ is not getattr(type(layer), "meta", None)
        or len(meta.args) != 1
    ):
        return None, None
    return layer, meta.args[0]


def parameters(layer: Any, x: Tensor, context: Tensor | None) -> Tensor:
    """[N, C' * P] from what they depend on."""
    return layer.hyper(*arguments(x, context))  # type: ignore[no-any-return]


def arguments(x: Tensor, context: Tensor | None) -> tuple[Tensor]:
    return (x if context is None else torch.cat([x, context], dim=1),)


def described(layer: Any) -> tuple[Any, Describe]:
    """The masked network of a layer, and how it is described."""
    features = layer.hyper.out_features // layer.total
    return layer.hyper, functools.partial(masked_mlp, layer.hyper, features)


class AutoregressiveTransform(Transformation):
    of, project, does = "AutoregressiveTransform", PROJECT, "transformation and log-det in one pass"

    def _fused_rows(
        self: Any, layer: Any, elements: Elements, x: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        if not inverse:
            phi = in_one(*described(layer), functools.partial(parameters, layer), x, context)
            return elements(x, parameters(layer, x, context) if phi is None else phi)
        made = inverted(*described(layer), arguments, elements_by(elements), elements.known(), x, context)
        if made is not None:
            return made
        found = torch.zeros_like(x)
        for _ in range(self.passes):
            found, log_det = elements(x, parameters(layer, found, context), inverse=True)
        return found, log_det


def elements_by(elements: Elements) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda values, phi, inverse, features: elements(values, phi, inverse)


class CouplingTransform(Transformation):
    of, project, does = "CouplingTransform", PROJECT, "split, transformation, log-det and merge in one pass"

    def _fused_rows(
        self: Any, layer: Any, elements: Elements, x: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return elements(x, parameters(layer, x.index_select(1, self.idx_a), context), inverse, self.idx_b)


class MaskedAutoregressiveTransform(StandIn):
    of, project, does = "MaskedAutoregressiveTransform", PROJECT, AutoregressiveTransform.does
    takes, has = ("c",), ("univariate", "shapes", "total", "hyper", "passes")
    relies_on = ("meta",)

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        yield from unknown(module)

    @classmethod
    def says(cls, module: Any) -> str:
        return f"{cls.does}; {manner(*described(module))}"

    def forward(self: Any, c: Tensor | None = None) -> Any:
        return built(AutoregressiveTransform, self.theirs(c))


class GeneralCouplingTransform(StandIn):
    of, project, does = "GeneralCouplingTransform", PROJECT, CouplingTransform.does
    takes, has = ("c",), ("univariate", "shapes", "total", "hyper", "mask")
    relies_on = ("meta",)

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        yield from unknown(module)

    def forward(self: Any, c: Tensor | None = None) -> Any:
        return built(CouplingTransform, self.theirs(c))


def built(mixin: type[Transformation], transform: Any) -> Any:
    if type(transform).__name__ == mixin.of:
        put(mixin, transform)
    return transform


STAND_INS = (MaskedAutoregressiveTransform, GeneralCouplingTransform)
