"""`NeuralSplineFlow`: couplings or autoregressive layers of splines. Durkan et al. 2019 (Neural spline flows)."""

from ..flows import MADE, ActNorm, Permutation, ResidualMLP, Spline, SplineAutoregressive, SplineCoupling, Transform
from ._flow_model import FlowModel, check_vector, stack

KINDS = ("coupling", "autoregressive")


class NeuralSplineFlow(FlowModel):
    """A density of vectors [N, features]: splines in [-bound, bound], the identity beyond, features permuted between layers.

    Data should be standardised. Couplings are fast both ways; autoregressive layers bend more, and find samples feature by feature.

    Args:
        features: D, at least 2.
        kind: ``"coupling"`` (RQ-NSF (C) of the paper) or ``"autoregressive"`` (RQ-NSF (AR)).
        num_transforms: layers.
        num_bins: K.
        bound: of the box.
        hidden_features, num_blocks: of each network.
        context_features: of a context [N, context_features]; None for none.
        actnorm: whether an actnorm, initialised by the first batch, stands before each layer.
        reversible: train in the memory of one layer; :func:`fastgen.flows.reversible`.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        features: int,
        *,
        kind: str = "coupling",
        num_transforms: int = 5,
        num_bins: int = 8,
        bound: float = 3.0,
        hidden_features: int = 128,
        num_blocks: int = 2,
        context_features: int | None = None,
        actnorm: bool = False,
        reversible: bool = False,
    ) -> None:
        config = {
            "features": features,
            "kind": kind,
            "num_transforms": num_transforms,
            "num_bins": num_bins,
            "bound": bound,
            "hidden_features": hidden_features,
            "num_blocks": num_blocks,
            "context_features": context_features,
            "actnorm": actnorm,
            "reversible": reversible,
        }
        name = "NeuralSplineFlow"
        check_vector(name, config, "num_transforms", "num_bins", "hidden_features", "num_blocks")
        if kind not in KINDS:
            raise ValueError(f"{name}: kind must be one of {KINDS}, got {kind!r}")
        sizes = {"hidden_features": hidden_features, "num_blocks": num_blocks, "context_features": context_features}
        spline = Spline(num_bins, bound, scale=hidden_features**-0.5)
        layers: list[Transform] = []
        for i in range(num_transforms):
            layers += [] if i == 0 else [Permutation.random(features, seed=i)]
            layers += [ActNorm(features)] if actnorm else []
            if kind == "coupling":
                transformed = features - features // 2
                network = ResidualMLP(features // 2, transformed * spline.num_parameters, **sizes)  # type: ignore[arg-type]
                layers.append(SplineCoupling(network, features, spline=spline))
            else:
                made = MADE(features, spline.num_parameters, **sizes)  # type: ignore[arg-type]
                layers.append(SplineAutoregressive(made, features, spline=spline))
        super().__init__(config, stack(layers, reversible=reversible), (features,))
