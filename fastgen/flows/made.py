"""`MADE`: a network whose outputs for feature d depend on the features before d. Germain et al. 2015 (MADE)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..nn import MaskedLinear
from ..ops._watchers import autocast_active, watched
from .autoregressive_conditioner import Conditioner, ConditionerPlan, ContextLayer, MaskedLayer
from .conditioners import zero


class MADE(nn.Module):
    """[N, features] -> [N, features * outputs_per_feature], the outputs of a feature side by side.

    A masked linear layer, residual blocks of x + linear(relu(linear(relu(x)))) with masks, a masked linear layer from 0: nflows'
    network, whose weights it loads. Unit i of a hidden layer sees the first 1 + i mod (D - 1) features.

    Without gradients, on a CPU, all layers are computed in one, and their masked halves not at all.

    Args:
        features: D.
        outputs_per_feature: P.
        hidden_features: width.
        num_blocks: how many.
        context_features: of a context [N, context_features]; relu(linear(context)) is added to the first layer; None for none.
        zero_init: whether the last layer begins at 0.
    """

    def __init__(
        self,
        features: int,
        outputs_per_feature: int,
        *,
        hidden_features: int = 128,
        num_blocks: int = 2,
        context_features: int | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.features, self.hidden_features, self.context_features = features, hidden_features, context_features
        self.outputs_per_feature, self.plan = outputs_per_feature, ConditionerPlan()
        inputs = range(1, features + 1)
        hidden = [1 + i % max(features - 1, 1) for i in range(hidden_features)]
        if features == 1:
            hidden = [1] * hidden_features
        outputs = [degree for degree in inputs for _ in range(outputs_per_feature)]
        self.initial_layer = MaskedLinear(inputs, hidden)
        self.context_layer = None if context_features is None else nn.Linear(context_features, hidden_features)
        self.blocks = nn.ModuleList(_MaskedBlock(hidden) for _ in range(num_blocks))
        self.final_layer = MaskedLinear(hidden, outputs, strict=True)
        if zero_init:
            zero(self.final_layer)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Raises ValueError where ``context`` is missing or superfluous, or of another shape."""
        wanted = None if self.context_layer is None else (len(x), self.context_features)
        if (None if context is None else tuple(context.shape)) != wanted:
            got = "None" if context is None else f"shape {tuple(context.shape)}"
            raise ValueError(f"MADE: context must be {'None' if wanted is None else list(wanted)}, got {got}")
        if self._fits_one_op(x, context):
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            operands = self.plan.operands(self.conditioner(), context, dtype, stepwise=False)
            return ops.masked_linear_network(x, *operands, outputs=self.final_layer.out_features)
        h = self.initial_layer(x)
        if self.context_layer is not None:
            h = h + F.relu(self.context_layer(context))
        for block in self.blocks:
            h = block(h)
        return self.final_layer(h)

    def conditioner(self) -> Conditioner:
        """The network as :func:`fastgen.flows.invert` wants it described; the same object while it is of the same tensors."""
        return self.plan.described(self._tensors(), self._describe)

    def _tensors(self) -> list[Tensor | None]:
        linears = [self.initial_layer, *(m for block in self.blocks for m in block.linear_layers), self.final_layer]  # type: ignore[union-attr]
        found = [t for linear in linears for t in (linear.weight, linear.bias, linear.mask)]  # type: ignore[union-attr]
        context = self.context_layer
        return found if context is None else [*found, context.weight, context.bias]

    def _describe(self) -> Conditioner:
        layers: list[MaskedLayer] = []

        def masked(linear: nn.Module, *, activation: str = "relu", residual: int | None = None) -> None:
            add = None
            if linear is self.initial_layer and self.context_layer is not None:
                add = ContextLayer(self.context_layer.weight, self.context_layer.bias, "relu")
            assert isinstance(linear, MaskedLinear)
            layers.append(MaskedLayer(linear.weight, linear.bias, linear.mask, activation, None, residual, add))

        last = "relu" if len(self.blocks) else "none"
        masked(self.initial_layer, activation=last)
        for number, block in enumerate(self.blocks, 1):
            entry = len(layers) - 1
            first, second = block.linear_layers  # type: ignore[misc, union-attr]
            masked(first)
            masked(second, activation="none" if number == len(self.blocks) else "relu", residual=entry)
        masked(self.final_layer, activation="none")
        return Conditioner(layers, self.features, self.outputs_per_feature)

    def _fits_one_op(self, x: Tensor, context: Tensor | None) -> bool:
        """Whether nothing must see the layers one by one."""
        if watched() or autocast_active(x.device) or not ops.masked_linear_network_fits(x):
            return False
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.parameters())):
            return False
        return x.dim() == 2 and not _hooked(self) and not (context is not None and context.requires_grad)


def _hooked(module: nn.Module) -> bool:
    """Whether a hook looks at something in ``module``."""
    inner = [m for m in module._modules.values() if m is not None]
    return any(m._forward_hooks or m._forward_pre_hooks or (m._modules and _hooked(m)) for m in inner)


class _MaskedBlock(nn.Module):
    def __init__(self, degrees: list[int]) -> None:
        super().__init__()
        self.linear_layers = nn.ModuleList(MaskedLinear(degrees, degrees) for _ in range(2))
        nn.init.uniform_(self.linear_layers[1].weight, -1e-3, 1e-3)  # type: ignore[arg-type]
        nn.init.uniform_(self.linear_layers[1].bias, -1e-3, 1e-3)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linear_layers
        return x + second(F.relu(first(F.relu(x))))
