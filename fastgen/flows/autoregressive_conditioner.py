"""`Conditioner`: a masked network described layer by layer, whosever it is, and its plan: programs, and weights packed by them.

A description holds the very weights and masks of the network. What is made of them is kept by a :class:`ConditionerPlan` for as
long as they do not change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._schema import NODE_ACTIVATIONS
from ..ops._masked_network import (
    INPUT,
    Layer,
    NetworkProgram,
    feature_levels,
    network_program,
    pack_units,
    pack_weights,
)
from ..ops._packed_weights import Seen

__all__ = ["INPUT", "Conditioner", "ConditionerPlan", "ContextLayer", "MaskedLayer", "NotPlannable"]


class NotPlannable(ValueError):
    """Why a conditioner has no plan."""


@dataclass(frozen=True)
class ContextLayer:
    """act(weight context + bias), [N, units of the layer it is for]; the activation is one of NODE_ACTIVATIONS."""

    weight: Tensor
    bias: Tensor | None = None
    activation: str = "none"


@dataclass(frozen=True)
class MaskedLayer:
    """act(((mask weight) source + bias + add) gate + residual).

    Attributes:
        weight: [units, units of the source], and where the source is the input as many columns more as the context has features.
        bias: [units].
        mask: of the shape of ``weight``, boolean or zeros and ones.
        activation: of NODE_ACTIVATIONS; what reads the layer sees it.
        source: the layer that is read, as it is after its activation: the one before where not given, ``INPUT`` for the input.
        residual: the layer that is added, as it is before its activation.
        add, gate: what the context adds and multiplies by, before the residual.
    """

    weight: Tensor
    bias: Tensor | None
    mask: Tensor
    activation: str = "none"
    source: int | None = None
    residual: int | None = None
    add: ContextLayer | None = None
    gate: ContextLayer | None = None


@dataclass(frozen=True)
class Conditioner:
    """A network [N, features] -> [N, features * per_feature], the parameters of a feature of those that come before it.

    In which order features come, and which of them are known together, is read off the masks.

    Attributes:
        layers: in an order in which they can be computed; the last makes the outputs.
        interleaved: whether the parameters of a feature lie side by side, output f P + p, or far apart, output p D + f.
    """

    layers: Sequence[MaskedLayer]
    features: int
    per_feature: int
    interleaved: bool = True


class Operands(NamedTuple):
    """What `fastgen.ops.autoregressive_inverse` and `masked_linear_network` take."""

    program: Tensor
    weights: Tensor
    parameters: Tensor
    constants: Tensor | None


class _Packed(NamedTuple):
    seen: list[Seen]
    program: Tensor
    weights: Tensor
    parameters: Tensor
    context: list[ContextLayer]  # their units in the order of the constants


class ConditionerPlan:
    """The programs of one conditioner, and its weights as they were last seen. A copy begins empty."""

    def __init__(self) -> None:
        self._structure: tuple[Any, ...] | None = None
        self._masks: list[Seen] = []
        self._last: Conditioner | None = None  # the description that was looked at
        self._described: tuple[list[Tensor | None], Conditioner | None] = [], None
        self._layers: list[Layer] = []
        self._levels: list[list[int]] = []
        self._programs: dict[bool, NetworkProgram] = {}
        self._packed: dict[tuple[bool, torch.dtype], _Packed] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ConditionerPlan":
        return ConditionerPlan()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ConditionerPlan, ()

    def described(self, tensors: list[Tensor | None], describe: Callable[[], Conditioner]) -> Conditioner:
        """What ``describe`` gave for these very tensors, if they were the last, which spares describing the network anew."""
        given, conditioner = self._described
        same = conditioner is not None and len(given) == len(tensors)
        if conditioner is None or not same or any(a is not b for a, b in zip(given, tensors, strict=True)):
            conditioner = describe()
            self._described = tensors, conditioner
        return conditioner

    def program(self, conditioner: Conditioner, *, stepwise: bool) -> NetworkProgram:
        """The program to find features level by level, or to compute all outputs.

        Raises:
            NotPlannable: a feature depends on itself, or a layer is not as :class:`MaskedLayer` says.
        """
        self._look_at(conditioner)
        if stepwise not in self._programs:
            arguments = (self._layers, conditioner.features, conditioner.per_feature, self._levels)
            self._programs[stepwise] = network_program(*arguments, stepwise=stepwise)
        return self._programs[stepwise]

    def operands(
        self, conditioner: Conditioner, context: Tensor | None, dtype: torch.dtype, *, stepwise: bool
    ) -> Operands:
        """``dtype``: of the arithmetic, float32 or float64.

        Raises:
            NotPlannable: as :meth:`program`.
            ValueError: ``context`` is missing or superfluous, or does not fit the weights.
        """
        return self.prepare(conditioner, context, dtype, stepwise=stepwise)[1]

    def prepare(
        self, conditioner: Conditioner, context: Tensor | None, dtype: torch.dtype, *, stepwise: bool
    ) -> tuple[NetworkProgram, Operands]:
        """Both :meth:`program` and :meth:`operands`."""
        program = self.program(conditioner, stepwise=stepwise)
        packed = self._packed.get((stepwise, dtype))
        tensors = list(_tensors(conditioner))
        if packed is None or not all(s.fits(t) for s, t in zip(packed.seen, tensors, strict=True)):
            packed = self._packed[stepwise, dtype] = _pack(conditioner, program, tensors, dtype)
        constants = None
        if packed.context:
            if context is None:
                raise ValueError("the network needs a context")
            given = context.detach().to(dtype)
            constants = torch.cat([_of_context(layer, given) for layer in packed.context], 1).contiguous()
        elif context is not None:
            raise ValueError("the network takes no context")
        return program, Operands(packed.program, packed.weights, packed.parameters, constants)

    def _look_at(self, conditioner: Conditioner) -> None:
        """Forget what was made of another structure or of other masks."""
        layers = conditioner.layers
        if conditioner is self._last and all(s.fits(r.mask) for s, r in zip(self._masks, layers, strict=True)):
            return
        structure = (
            conditioner.features,
            conditioner.per_feature,
            conditioner.interleaved,
            *((r.activation, r.source, r.residual, r.add is None, r.gate is None, r.bias is None) for r in layers),
        )
        masks = [layer.mask for layer in layers]
        if self._structure == structure and all(s.fits(m) for s, m in zip(self._masks, masks, strict=True)):
            self._last = conditioner
            return
        kept = self._described
        self.__init__()  # type: ignore[misc]
        self._described = kept
        self._layers = _layers(conditioner)
        try:
            self._levels = feature_levels(self._layers, conditioner.features, conditioner.per_feature)
        except ValueError as error:
            raise NotPlannable(str(error)) from None
        self._structure, self._masks, self._last = structure, [Seen(mask) for mask in masks], conditioner


def _layers(conditioner: Conditioner) -> list[Layer]:
    """The structure as programs are made of it, outputs in the order f P + p."""
    features, last = conditioner.features, len(conditioner.layers) - 1
    layers: list[Layer] = []
    for number, layer in enumerate(conditioner.layers):
        source = _source(conditioner, number)
        known = -1 <= source < number and (layer.residual is None or 0 <= layer.residual < number)
        if not known:
            raise NotPlannable(f"layer {number} reads a layer that does not come before it")
        if layer.activation not in NODE_ACTIVATIONS:
            raise NotPlannable(
                f"layer {number} has an activation {layer.activation!r}, which is none of NODE_ACTIVATIONS"
            )
        columns = features if source == INPUT else layers[source].mask.shape[0]
        wider = source == INPUT and layer.weight.shape[1] > features
        if layer.weight.shape != layer.mask.shape or (layer.weight.shape[1] != columns and not wider):
            shapes = f"weight of {tuple(layer.weight.shape)} and mask of {tuple(layer.mask.shape)}"
            raise NotPlannable(f"layer {number} must have {columns} inputs, got {shapes}")
        mask = layer.mask[:, :columns].detach().cpu() != 0
        if number == last:
            if len(mask) != features * conditioner.per_feature:
                raise NotPlannable(
                    f"the last layer must have {features * conditioner.per_feature} units, got {len(mask)}"
                )
            mask = mask[_outputs(conditioner)]
        layers.append(
            Layer(
                mask,
                source,
                layer.residual,
                layer.activation,
                layer.add is not None or wider,
                layer.gate is not None,
                layer.bias is not None,
            )
        )
        if layer.residual is not None and len(layers[layer.residual].mask) != len(mask):
            raise NotPlannable(f"layer {number} adds layer {layer.residual}, which has another number of units")
    if layers[-1].activation != "none" or layers[-1].residual is not None:
        raise NotPlannable("the last layer must be a masked linear alone")
    return layers


def _source(conditioner: Conditioner, number: int) -> int:
    source = conditioner.layers[number].source
    return number - 1 if source is None else source


def _outputs(conditioner: Conditioner) -> Tensor:
    """The unit that is output f P + p."""
    units = torch.arange(conditioner.features * conditioner.per_feature)
    return units if conditioner.interleaved else units.view(conditioner.per_feature, -1).T.flatten()


def _tensors(conditioner: Conditioner) -> Any:
    """All weights and biases, in order."""
    for layer in conditioner.layers:
        for part in (layer, layer.add, layer.gate):
            if part is not None:
                yield part.weight
                if part.bias is not None:
                    yield part.bias


def _pack(conditioner: Conditioner, program: NetworkProgram, tensors: list[Tensor], dtype: torch.dtype) -> _Packed:
    features, layers = conditioner.features, conditioner.layers
    device = layers[0].weight.device
    seen = [Seen(t) for t in tensors]  # as they are before they are read
    weights, biases, context = [], [], []
    for number, (layer, units) in enumerate(zip(layers, program.units, strict=True)):
        reads_input = _source(conditioner, number) == INPUT
        order = _outputs(conditioner).to(device) if number == len(layers) - 1 else None
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        if order is not None:
            weight, bias = weight[order], None if bias is None else bias[order]
        units = units.to(device)
        if reads_input and weight.shape[1] > features:
            rest = weight[:, features:] * (layer.mask if order is None else layer.mask[order])[:, features:]
            add = layer.add
            if add is None:
                context.append(_ordered(ContextLayer(rest), units, dtype))
            else:
                raise NotPlannable(f"layer {number} reads the context twice")
            weight = weight[:, :features]
        for part in (layer.add, layer.gate):
            if part is not None:
                context.append(_ordered(part, units if order is None else order[units], dtype))
        weights.append(weight)
        biases.append(bias)
    return _Packed(
        seen,
        program.program.to(device),
        pack_weights(program, weights, dtype),
        pack_units(program, biases, dtype, device),
        context,
    )


def _ordered(layer: ContextLayer, units: Tensor, dtype: torch.dtype) -> ContextLayer:
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)[units]
    return ContextLayer(layer.weight.detach().to(dtype)[units], bias, layer.activation)


def _of_context(layer: ContextLayer, context: Tensor) -> Tensor:
    value = F.linear(context, layer.weight, layer.bias)
    if layer.activation == "none":
        return value
    if layer.activation == "leaky_relu":
        return F.leaky_relu(value, 0.01)
    if layer.activation == "gelu_tanh":
        return F.gelu(value, approximate="tanh")
    name = layer.activation
    return getattr(torch if name in ("tanh", "sigmoid", "exp") else F, name)(value)
