"""`MAF` and `IAF`: masked autoregressive flows, fast at densities, and their inverses, fast at samples.

Papamakarios et al. 2017 (Masked autoregressive flow for density estimation); Kingma et al. 2016 (Improving variational inference
with inverse autoregressive flow).
"""

from collections.abc import Mapping
from typing import Any

from ..flows import MADE, ActNorm, AffineAutoregressive, Inverse, Reverse, Transform
from ._flow_model import FlowModel, check_vector, stack


class MAF(FlowModel):
    """A density of vectors [N, features]: affine autoregressive layers, the order of the features reversed between them.

    :meth:`log_prob` is one pass of each network, :meth:`sample` finds one feature after the other.

    Args:
        features: D, at least 2.
        num_transforms: layers; 5 or 10 in the paper.
        hidden_features, num_blocks: of each :class:`fastgen.flows.MADE`.
        scale_fn: as :func:`fastgen.ops.affine_coupling` names it; ``"soft_clip"`` is zuko's, exp of a bounded number.
        context_features: of a context [N, context_features]; None for none.
        actnorm: whether an actnorm, initialised by the first batch, stands before each layer, for the paper's batch norm.
        reversible: train in the memory of one layer; :func:`fastgen.flows.reversible`. Its backward pass inverts the layers.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        features: int,
        *,
        num_transforms: int = 5,
        hidden_features: int = 128,
        num_blocks: int = 2,
        scale_fn: str = "soft_clip",
        context_features: int | None = None,
        actnorm: bool = False,
        reversible: bool = False,
    ) -> None:
        config = {
            "features": features,
            "num_transforms": num_transforms,
            "hidden_features": hidden_features,
            "num_blocks": num_blocks,
            "scale_fn": scale_fn,
            "context_features": context_features,
            "actnorm": actnorm,
            "reversible": reversible,
        }
        layers = _layers(type(self).__name__, config, inverse=False)
        super().__init__(config, stack(layers, reversible=reversible), (features,))


class IAF(FlowModel):
    """A density of vectors [N, features]: the inverses of affine autoregressive layers, with reversals between them.

    :meth:`sample` is one pass of each network, :meth:`log_prob` finds one feature after the other.

    Args:
        features, num_transforms, hidden_features, num_blocks, scale_fn, context_features, actnorm, reversible: as in :class:`MAF`.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        features: int,
        *,
        num_transforms: int = 5,
        hidden_features: int = 128,
        num_blocks: int = 2,
        scale_fn: str = "soft_clip",
        context_features: int | None = None,
        actnorm: bool = False,
        reversible: bool = False,
    ) -> None:
        config = {
            "features": features,
            "num_transforms": num_transforms,
            "hidden_features": hidden_features,
            "num_blocks": num_blocks,
            "scale_fn": scale_fn,
            "context_features": context_features,
            "actnorm": actnorm,
            "reversible": reversible,
        }
        layers = _layers(type(self).__name__, config, inverse=True)
        super().__init__(config, stack(layers, reversible=reversible), (features,))


def _layers(name: str, config: Mapping[str, Any], *, inverse: bool) -> list[Transform]:
    check_vector(name, config, "num_transforms", "hidden_features", "num_blocks")
    layers: list[Transform] = []
    for i in range(config["num_transforms"]):
        network = MADE(
            config["features"],
            2,
            hidden_features=config["hidden_features"],
            num_blocks=config["num_blocks"],
            context_features=config["context_features"],
        )
        layer = AffineAutoregressive(network, config["features"], scale_fn=config["scale_fn"])
        layers += [] if i == 0 else [Reverse()]
        layers += [ActNorm(config["features"])] if config["actnorm"] else []
        layers.append(Inverse(layer) if inverse else layer)
    return layers
