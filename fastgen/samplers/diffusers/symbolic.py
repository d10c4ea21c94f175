"""`Symbolic`: what a scheduler's step does to its tensors, followed through diffusers' own code.

A step is given symbols in place of tensors. What comes out is a linear combination of them, with the coefficients that the code
has worked out on the way. Only what keeps it one is let through; at anything else `NotLinear` leaves the step to diffusers.
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

Name = tuple[
    Any, ...
]  # ("sample",), ("model",), ("noise",), ("prediction",), ("state", attribute, place), ("given", argument)
SAMPLE, MODEL, NOISE, PREDICTION, VARIANCE, ONE = (
    (name,) for name in ("sample", "model", "noise", "prediction", "variance", "one")
)
Terms = Mapping[Name, float]


class NotLinear(Exception):
    """The step does something to its tensors that a row of a coefficient table does not hold; the message says what."""


class Symbolic:
    """A linear combination of symbols that passes for a tensor of ``dtype`` and ``shape``.

    ``terms`` maps symbols to coefficients in float64, which are those of the code that made it: Python floats, and the values of
    0-dimensional tensors in whatever precision it has worked them out.
    """

    __slots__ = ("device", "dtype", "log_scale", "shape", "terms")
    __array_ufunc__ = None  # numbers of NumPy leave the arithmetic to us

    def __init__(
        self,
        terms: Terms,
        dtype: torch.dtype,
        shape: Sequence[int],
        device: torch.device,
        log_scale: tuple[float, float] | None = None,
    ) -> None:
        self.terms, self.dtype, self.shape, self.device = dict(terms), dtype, torch.Size(shape), device
        self.log_scale = log_scale  # (l, m) of a product with exp(l + m v), v the learned variance

    # ---- arithmetic -------------------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> "Symbolic":
        return self._plus(other, 1.0, 1.0)

    __radd__ = __iadd__ = __add__

    def __sub__(self, other: Any) -> "Symbolic":
        return self._plus(other, 1.0, -1.0)

    __isub__ = __sub__

    def __rsub__(self, other: Any) -> "Symbolic":
        return self._plus(other, -1.0, 1.0)

    def __rtruediv__(self, other: Any) -> "Symbolic":
        raise NotLinear("a division by a tensor")

    def __neg__(self) -> "Symbolic":
        return self._map(lambda value: -value)

    def __mul__(self, other: Any) -> "Symbolic":
        if isinstance(other, Symbolic):
            return _product(self, other)
        factor = _number(other)
        return self._map(lambda value: value * factor)

    __rmul__ = __imul__ = __mul__

    def __truediv__(self, other: Any) -> "Symbolic":
        divisor = _number(other)
        if divisor == 0:
            raise NotLinear("a division by zero")
        return self._map(lambda value: value / divisor)

    __itruediv__ = __truediv__

    def _plus(self, other: Any, a: float, b: float) -> "Symbolic":
        if not isinstance(other, Symbolic):
            constant = _number(other)
            if constant == 0:
                return self if a == 1 else -self
            other = Symbolic({ONE: constant}, self.dtype, self.shape, self.device)
        if other.shape != self.shape:
            raise NotLinear(f"tensors of the shapes {tuple(self.shape)} and {tuple(other.shape)} together")
        scale = self.log_scale or other.log_scale
        if scale is not None:
            self._check_scaled()
            other._check_scaled()
        terms = {symbol: a * value for symbol, value in self.terms.items()}
        for symbol, value in other.terms.items():
            terms[symbol] = terms.get(symbol, 0.0) + b * value
        return Symbolic(terms, torch.promote_types(self.dtype, other.dtype), self.shape, self.device, scale)

    def _check_scaled(self) -> None:
        """A learned scale in a sum belongs to the noise there, and to all of it."""
        if (self.log_scale is None) == (NOISE in self.terms):
            raise NotLinear("a learned variance of more than the noise")

    def _map(self, function: Callable[[float], float]) -> "Symbolic":
        terms = {symbol: function(value) for symbol, value in self.terms.items()}
        return Symbolic(terms, self.dtype, self.shape, self.device, self.log_scale)

    # ---- what else a step asks of a tensor --------------------------------------------------------------------------

    def to(self, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> "Symbolic":
        dtype = dtype or next((a for a in args if isinstance(a, torch.dtype)), None)
        if dtype is None or dtype == self.dtype:
            return self
        return Symbolic(self.terms, dtype, self.shape, self.device, self.log_scale)

    def type(self, dtype: torch.dtype) -> "Symbolic":
        return self.to(dtype)

    def float(self) -> "Symbolic":
        return self.to(torch.float32)

    def clone(self, **kwargs: Any) -> "Symbolic":
        return self._map(lambda value: value)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def clamp(self, min: Any = None, max: Any = None) -> "Symbolic":
        recording = Recording.now()
        recording.predict(self, -math.inf if min is None else _number(min), math.inf if max is None else _number(max))
        return recording.symbol(PREDICTION, self)

    def __getitem__(self, index: Any) -> "Symbolic":
        """The first half of the channels, where the second is a learned variance."""
        half = Recording.now().channels
        if self.terms == {MODEL: 1.0} and self.shape[1] == 2 * half and index == (slice(None), slice(None, half)):
            return Recording.now().halves(self)[0]
        raise NotLinear("a part of a tensor")

    def __getattr__(self, name: str) -> Any:
        raise NotLinear(f"Tensor.{name}")

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise NotLinear("a choice by the values of a tensor")

    def __repr__(self) -> str:
        return " + ".join(f"{value:g} {symbol}" for symbol, value in self.terms.items()) or "0"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        if name not in _FUNCTIONS:
            raise NotLinear(name)
        return _FUNCTIONS[name](*args, **(kwargs or {}))


def _refusing(operator: str) -> Callable[..., Any]:
    def refuse(*args: Any) -> Any:
        raise NotLinear(f"Tensor.__{operator}__")

    return refuse


for _operator in (
    "abs", "contains", "eq", "float", "floordiv", "ge", "gt", "int", "iter", "le", "len", "lt", "matmul", "mod", "ne", "pow",
    "rfloordiv", "rmatmul", "rmod", "rpow", "setitem",
):  # fmt: skip
    setattr(Symbolic, f"__{_operator}__", _refusing(_operator))


class Stack:
    """Several of one shape, side by side: the argument of a weighted sum."""

    def __init__(self, values: Sequence[Symbolic]) -> None:
        self.values = list(values)
        self.shape = torch.Size((values[0].shape[0], len(values), *values[0].shape[1:]))

    __torch_function__ = Symbolic.__torch_function__

    def __getattr__(self, name: str) -> Any:
        raise NotLinear(f"Tensor.{name} of a stack")


def _product(a: Symbolic, b: Symbolic) -> Symbolic:
    """A learned standard deviation times noise: the one product that a row knows."""
    for factor, other in ((a, b), (b, a)):
        if factor.terms.keys() == {ONE} and factor.log_scale is not None and other.terms.keys() == {NOISE}:
            amount = factor.terms[ONE] * other.terms[NOISE]
            return Symbolic({NOISE: amount}, other.dtype, other.shape, other.device, factor.log_scale)
    raise NotLinear("the product of two tensors")


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise NotLinear(f"a factor of shape {tuple(value.shape)}")
    if isinstance(value, Symbolic | Stack):
        raise NotLinear("a tensor where a number belongs")
    return float(value)


def _stack(tensors: Sequence[Symbolic], dim: int = 0) -> Stack:
    if dim != 1 or not all(isinstance(t, Symbolic) for t in tensors):
        raise NotLinear("stack")
    return Stack(tensors)


def _einsum(equation: str, *operands: Any) -> Symbolic:
    weights, stack = operands[0] if len(operands) == 1 else operands
    if equation != "k,bkc...->bc..." or not isinstance(stack, Stack):
        raise NotLinear(f"einsum {equation!r}")
    return sum((weight * value for weight, value in zip(weights.tolist(), stack.values, strict=True)), start=0)  # type: ignore[return-value]


def _exp(exponent: Symbolic) -> Symbolic:
    """Of l + m v: the standard deviation that a model has learned."""
    if not exponent.terms.keys() <= {ONE, VARIANCE}:
        raise NotLinear("exp")
    scale = exponent.terms.get(ONE, 0.0), exponent.terms.get(VARIANCE, 0.0)
    return Symbolic({ONE: 1.0}, exponent.dtype, exponent.shape, exponent.device, scale)


def _split(tensor: Symbolic, size: int, dim: int = 0) -> tuple[Symbolic, Symbolic]:
    recording = Recording.now()
    if tensor.terms != {MODEL: 1.0} or dim != 1 or tensor.shape[1] != 2 * size or size != recording.channels:
        raise NotLinear("split")
    return recording.halves(tensor)


def _zeros_like(tensor: Symbolic, **kwargs: Any) -> Symbolic:
    return Symbolic({}, kwargs.get("dtype") or tensor.dtype, tensor.shape, tensor.device)


def _randn_like(tensor: Symbolic, **kwargs: Any) -> Symbolic:
    return Recording.now().draw(tensor.shape, kwargs.get("dtype") or tensor.dtype, tensor.device)


def _reflected(operator: str) -> Callable[[Any, Any], Any]:
    """The operator where one of the two is a symbol; a tensor on the left would ask again."""

    def call(a: Any, b: Any) -> Any:
        return getattr(a, f"__{operator}__")(b) if isinstance(a, Symbolic) else getattr(b, f"__r{operator}__")(a)

    return call


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": _reflected("add"),
    "sub": _reflected("sub"),
    "mul": _reflected("mul"),
    "div": _reflected("truediv"),
    "clamp": lambda a, min=None, max=None: a.clamp(min, max),
    "stack": _stack,
    "einsum": _einsum,
    "exp": _exp,
    "split": _split,
    "zeros_like": _zeros_like,
    "randn_like": _randn_like,
}
for _name, _function in list(_FUNCTIONS.items())[:3]:
    _FUNCTIONS[f"__{_name}__"] = _function
    _FUNCTIONS[f"__r{_name}__"] = lambda a, b, function=_function: function(b, a)
_FUNCTIONS |= {"true_divide": _FUNCTIONS["div"], "__truediv__": _FUNCTIONS["div"]}


class Recording:
    """What else happens while a step is followed: the noise that it draws, and how it clips the predicted sample.

    Attributes:
        channels: of the sample; a model's output may have twice as many.
        noise_dtype: in which the step draws its noise; None where it draws none.
        prediction: what is clipped, once a step; None where nothing is.
        bounds: between which.
        threshold: whether the bound is sought in the values, and the prediction divided by it.
        learned_variance: whether the model's output has been split.
    """

    _active = threading.local()

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.noise_dtype: torch.dtype | None = None
        self.prediction: Symbolic | None = None
        self.bounds = (-math.inf, math.inf)
        self.threshold = self.learned_variance = False

    @classmethod
    def now(cls) -> "Recording":
        recording: Recording | None = getattr(cls._active, "recording", None)
        if recording is None:
            raise NotLinear("a symbol outside of a step")
        return recording

    def __enter__(self) -> "Recording":
        self._active.recording = self
        return self

    def __exit__(self, *exception: Any) -> None:
        self._active.recording = None

    def following(self, function: Any) -> Any:
        """``function`` of a module of diffusers, with symbols for the noise that it draws there."""
        if not isinstance(function, FunctionType) or "randn_tensor" not in function.__code__.co_names:
            return function
        names = {**function.__globals__, "randn_tensor": self._randn_tensor}
        made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
        made.__kwdefaults__ = function.__kwdefaults__
        return made

    def _randn_tensor(
        self,
        shape: Any,
        generator: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        layout: Any = None,
    ) -> Symbolic:
        """diffusers' function of this name."""
        return self.draw(shape, dtype or torch.get_default_dtype(), device)

    def symbol(self, name: Name, like: Symbolic) -> Symbolic:
        return Symbolic({name: 1.0}, like.dtype, like.shape, like.device)

    def draw(self, shape: Any, dtype: torch.dtype, device: Any) -> Symbolic:
        if self.noise_dtype is not None:
            raise NotLinear("two draws of noise")
        self.noise_dtype = dtype
        return Symbolic({NOISE: 1.0}, dtype, tuple(shape), torch.device(device or "cpu"))

    def predict(self, value: Symbolic, low: float, high: float) -> None:
        if self.prediction is not None:
            raise NotLinear("two clips")
        if not value.terms.keys() <= {SAMPLE, MODEL} or value.log_scale is not None:
            raise NotLinear("a clip of more than the predicted sample")
        self.prediction, self.bounds = value, (low, high)

    def predict_by_threshold(self, value: Symbolic) -> Symbolic:
        """In place of a scheduler's ``_threshold_sample``."""
        self.predict(value, -1.0, 1.0)
        self.threshold = True
        return self.symbol(PREDICTION, value)

    def halves(self, output: Symbolic) -> tuple[Symbolic, Symbolic]:
        """The prediction and the learned variance of a model's output."""
        self.learned_variance = True
        shape = (output.shape[0], self.channels, *output.shape[2:])
        first, second = (Symbolic({name: 1.0}, output.dtype, shape, output.device) for name in (MODEL, VARIANCE))
        return first, second
