"""The masked networks of nflows, normflows and zuko: their linears, all layers as one op, and inverses at the cost of one pass.

A network is described layer by layer for `fastgen.flows`. What has no description keeps its own code: an activation that is not
known, batch norm, dropout that drops, a hook that looks at its layers. A description is compared once with what its network does.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.weak import WeakTensorKeyDictionary

from ..flows import (
    AffineMap,
    AutoregressiveMap,
    Conditioner,
    ConditionerPlan,
    ContextLayer,
    MaskedLayer,
    NotPlannable,
    SplineMap,
    invert,
)
from ..ops import masked_linear, masked_linear_fits, masked_linear_network, masked_linear_network_fits
from ..ops._packed_weights import Seen
from ..ops._watchers import autocast_active, watched
from .fusing import idle
from .stand_in import StandIn, bare

MASKED = "nflows, normflows and zuko"
FUNCTIONS = {  # by what they are called in NODE_ACTIVATIONS
    F.relu: "relu", torch.relu: "relu", F.elu: "elu", F.leaky_relu: "leaky_relu", torch.tanh: "tanh", F.tanh: "tanh",
    torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.silu: "silu", F.gelu: "gelu", F.softplus: "softplus",
}  # fmt: skip
MODULES: dict[type[nn.Module], tuple[str, dict[str, Any]]] = {  # with the options that they have there
    nn.ReLU: ("relu", {}), nn.ELU: ("elu", {"alpha": 1.0}), nn.LeakyReLU: ("leaky_relu", {"negative_slope": 0.01}),
    nn.Tanh: ("tanh", {}), nn.Sigmoid: ("sigmoid", {}), nn.SiLU: ("silu", {}), nn.GELU: ("gelu", {"approximate": "none"}),
    nn.Softplus: ("softplus", {"beta": 1.0, "threshold": 20.0}),
}  # fmt: skip


def activation_of(activation: Any) -> str:
    if not isinstance(activation, nn.Module):
        name = FUNCTIONS.get(activation) if callable(activation) else None
    else:
        name, options = MODULES.get(type(activation), (None, {}))
        name = name if all(getattr(activation, n) == value for n, value in options.items()) else None
    if name is None:
        raise NotPlannable(f"activation {getattr(activation, '__name__', type(activation).__name__)}")
    return name


def masked_layer(linear: Any, **options: Any) -> MaskedLayer:
    if type(linear).__name__ != "MaskedLinear" or nn.utils.parametrize.is_parametrized(linear):
        raise NotPlannable(f"a layer of class {type(linear).__name__}")
    return MaskedLayer(linear.weight, linear.bias, linear.mask, **options)


def context_layer(of: Any, activation: str = "none") -> ContextLayer | None:
    linear = getattr(of, "context_layer", None)
    if linear is not None and type(linear) is not nn.Linear:
        raise NotPlannable(f"a context layer of class {type(linear).__name__}")
    return None if linear is None else ContextLayer(linear.weight, linear.bias, activation)


def made(net: Any, *, ever: bool = False) -> Conditioner:
    """nflows' and normflows' MADE; ``ever``: as it is in evaluation.

    Raises:
        NotPlannable: it has something that no description has.
    """
    if type(getattr(net, "preprocessing", None)) not in (type(None), nn.Identity):
        raise NotPlannable(f"{type(net.preprocessing).__name__} before it")
    normflows = hasattr(net, "preprocessing")
    first, blocks = net.initial_layer, list(net.blocks)
    residual = bool(blocks) and hasattr(blocks[0], "linear_layers")
    entry = activation_of(blocks[0].activation) if residual else "none"
    add = context_layer(net)
    if not normflows:
        own = activation_of(net.activation)
        add, entry = context_layer(net, own), entry if residual or net.use_residual_blocks else own
    layers = [masked_layer(first, activation=entry, add=add)]
    for number, block in enumerate(blocks, 1):
        if getattr(block, "use_batch_norm", False) or getattr(block, "batch_norm", None) is not None:
            raise NotPlannable("batch norm")
        if not ever and not idle(block.dropout):
            raise NotPlannable("dropout in training mode")
        own = activation_of(block.activation)
        if not residual:
            layers.append(masked_layer(block.linear, activation=own))
            continue
        into, out = block.linear_layers
        last = number == len(blocks)
        of_block = {"gate": context_layer(block, "sigmoid")} if normflows else {"add": context_layer(block)}
        layers.append(masked_layer(into, activation=own, **({} if normflows else of_block)))
        after = "none" if last else activation_of(blocks[number].activation)
        layers.append(masked_layer(out, activation=after, residual=len(layers) - 2, **(of_block if normflows else {})))
    layers.append(masked_layer(net.final_layer))
    features = first.in_features
    return Conditioner(layers, features, net.final_layer.out_features // features)


def masked_mlp(net: Any, features: int) -> Conditioner:
    """zuko's MaskedMLP of ``features`` features and what is left of its inputs as context.

    Raises:
        NotPlannable: as :func:`made`.
    """
    layers: list[MaskedLayer] = []
    source = -1
    for module in net:
        if type(module).__name__ == "Residual":
            into, activation, out = module
            layers.append(masked_layer(into, activation=activation_of(activation), source=source))
            layers.append(masked_layer(out, residual=source))
        elif type(module).__name__ == "MaskedLinear":
            layers.append(masked_layer(module, source=source))
        elif layers and layers[-1].activation == "none":
            layers[-1] = MaskedLayer(**{**vars(layers[-1]), "activation": activation_of(module)})
        else:
            raise NotPlannable(f"a layer of class {type(module).__name__}")
        source = len(layers) - 1
    return Conditioner(layers, features, net.out_features // features)


_PLANS: "WeakKeyDictionary[nn.Module, ConditionerPlan]" = WeakKeyDictionary()
_CHECKED: "WeakKeyDictionary[ConditionerPlan, tuple[Any, bool]]" = (
    WeakKeyDictionary()
)  # what, and whether it is what its network does


def plan_of(net: nn.Module) -> ConditionerPlan:
    return _PLANS.setdefault(net, ConditionerPlan())


Describe = Callable[[], Conditioner]
Network = Callable[[Tensor, Tensor | None], Tensor]


def described(net: nn.Module, describe: Describe, network: Network, context: Tensor | None) -> Conditioner:
    """The description of ``net``, compared once with what ``network`` computes.

    Raises:
        NotPlannable: it has none, or computes something else.
    """
    if not bare(net.modules()):
        raise NotPlannable("a hook on one of its layers")
    found, plan = describe(), plan_of(net)
    structure = [(r.activation, r.source, r.residual, _activation(r.add), _activation(r.gate)) for r in found.layers]
    known, right = _CHECKED.get(plan, (None, False))
    if known != structure:
        right = _agrees(found, plan, network, context)
        _CHECKED[plan] = structure, right
    if not right:
        raise NotPlannable("it computes something else than is known")
    return found


def _activation(layer: ContextLayer | None) -> str | None:
    return None if layer is None else layer.activation


@torch.no_grad()
def _agrees(found: Conditioner, plan: ConditionerPlan, network: Network, context: Tensor | None) -> bool:
    weight = found.layers[0].weight
    x = torch.arange(2.0 * found.features, device=weight.device).sin().to(weight.dtype).reshape(2, -1)
    given = None if context is None else context[:1].detach().expand(2, -1)
    operands = plan.operands(found, given, x.dtype, stepwise=False)
    ours = masked_linear_network(x, *operands, outputs=found.features * found.per_feature)
    theirs = network(x, given)
    bound = 1e-4 * float(theirs.abs().max())
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=bound)


def in_one(net: nn.Module, describe: Describe, network: Network, x: Tensor, context: Tensor | None) -> Tensor | None:
    """The outputs of ``net`` for x [N, D] by one op; None where it is to be called, as for gradients."""
    if watched() or autocast_active(x.device) or not masked_linear_network_fits(x) or x.dim() != 2:
        return None
    given = [x] if context is None else [x, context]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *net.parameters())):
        return None
    if any(t.dtype != x.dtype for t in (*given, *net.parameters())):
        return None
    try:
        found = described(net, describe, network, context)
        operands = plan_of(net).operands(found, context, x.dtype, stepwise=False)
    except ValueError:  # and NotPlannable
        return None
    if x.shape[1] != found.features:
        return None
    return masked_linear_network(x, *operands, outputs=found.features * found.per_feature)


def inverted(
    net: nn.Module,
    describe: Describe,
    arguments: Callable[[Tensor, Tensor | None], tuple[Any, ...]],
    elements: Callable[[Tensor, Tensor, bool, Any], tuple[Tensor, Tensor]],
    known: AffineMap | SplineMap | None,
    y: Tensor,
    context: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """x of y [N, D] and the log-det of that, by one pass where ``net`` can be planned and by Jacobi iteration where it cannot; None
    where their own loop has to run.

    ``arguments``: of x and the context, what ``net`` is called with. ``elements``: of values, parameters, the direction, and which
    features they are, what each feature is made to be.
    """
    if watched() or autocast_active(y.device) or y.dtype not in (torch.float32, torch.float64) or own_loop(net):
        return None
    if any(t.dtype != y.dtype for t in (*net.parameters(), *(() if context is None else (context,)))):
        return None

    def part(values: Tensor, parameters: Tensor, features: Any, *, inverse: bool) -> tuple[Tensor, Tensor]:
        return elements(values, parameters, inverse, features)

    named: dict[str, Tensor] = {}
    if torch.is_grad_enabled():
        named |= {name: p for name, p in net.named_parameters() if p.requires_grad}

    def network(x: Tensor, context: Tensor | None) -> Tensor:
        """By the parameters of this call, whatever stands in their place when its gradient is asked for (`functional_call`)."""
        args = arguments(x, context)
        return functional_call(net, named, args) if named else net(*args)  # type: ignore[no-any-return]

    forward, inverse = functools.partial(part, inverse=False), functools.partial(part, inverse=True)
    with_checks = functools.partial(described, net, describe, network, context)
    whole = AutoregressiveMap(network, forward, inverse, plan_of(net), known, with_checks, list(named.values()))
    try:
        x, log_det, _ = invert(whole, y, context)
    except ValueError:  # a context that does not fit, of which their code says what it says
        return None
    return x, log_det


def own_loop(net: nn.Module) -> str | None:
    """Why passes of ``net`` must be as many as ever: it draws, or keeps what it sees, or somebody looks at them."""
    if not bare(net.modules()):
        return "a hook on one of its layers"
    watchful = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    for module in net.modules():
        if module.training and isinstance(module, watchful) and getattr(module, "p", 1) > 0:
            return f"{type(module).__name__} in training mode"
    return None


def manner(net: nn.Module, describe: Describe) -> str:
    """How the inverse of a layer with this network is found, for the report."""
    if why := own_loop(net):
        return f"its inverse by their own loop: {why}"
    try:
        plan_of(net).program(describe(), stepwise=True)
    except NotPlannable as error:
        return f"its inverse by Jacobi iteration: {error}"
    except AttributeError:
        return "its inverse by Jacobi iteration: its network is not one that is known"
    return "its inverse in one pass"


_BOOLEAN = (
    WeakTensorKeyDictionary()
)  # mask -> (as it was seen, the same of booleans; None where it has other numbers than 0 and 1)


def boolean(mask: Tensor) -> Tensor | None:
    if mask.dtype == torch.bool:
        return mask
    seen, found = _BOOLEAN.get(mask, (None, None))
    if seen is None or not seen.fits(mask):
        found = mask != 0
        found = found if bool((found == mask).all()) else None
        _BOOLEAN[mask] = Seen(mask), found
    return found


class MaskedLinear(StandIn):
    of, project, does = "MaskedLinear", MASKED, "the weights that the mask leaves alone, and no masked copy of them"
    takes, has = ("x",), ("mask", "weight", "bias", "in_features", "out_features")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        if not isinstance(module.mask, Tensor) or module.mask.shape != module.weight.shape:
            yield "its mask has not the shape of its weight"
        elif boolean(module.mask) is None:
            yield "a mask of other numbers than 0 and 1"
        if nn.utils.parametrize.is_parametrized(module):
            yield "its weight is parametrized"

    def forward(self: Any, x: Tensor) -> Tensor:
        small = not masked_linear_fits(self.weight)
        mask = None if small or watched() or x.dim() == 0 else boolean(self.mask)
        if mask is None or x.shape[-1] != self.in_features or x.dtype != self.weight.dtype:
            return self.theirs(x)
        return masked_linear(x, self.weight, self.bias, mask=mask)


class MADE(StandIn):
    of, project, does = "MADE", MASKED, "without gradients, all layers in one op"
    takes, has = ("inputs", "context"), ("initial_layer", "blocks", "final_layer")

    @classmethod
    def reasons(cls, module: Any) -> Iterator[str]:
        try:
            made(module, ever=True)
        except NotPlannable as error:
            yield str(error)
        except AttributeError:
            yield "its blocks are not those that are known"

    def forward(self: Any, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        y = in_one(self, functools.partial(made, self), self.theirs, inputs, context)
        return self.theirs(inputs, context) if y is None else y


STAND_INS = (MaskedLinear, MADE)
