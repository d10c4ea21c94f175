"""`NICE`: additive couplings and one scaling. Dinh et al. 2014 (NICE: non-linear independent components estimation)."""

from ..flows import MLP, ActNorm, AdditiveCoupling
from ._flow_model import FlowModel, check_vector, stack


class NICE(FlowModel):
    """A density of vectors [N, features]: additive couplings of the odd and the even numbers in turn, and a learned scale of each.

    The paper has 4 couplings of 5 layers of 1000 for MNIST. The latent is normal, as in the paper for TFD, SVHN and CIFAR-10.

    Args:
        features: D, at least 2.
        num_couplings: how many.
        hidden_features, num_layers: of each coupling's network.
        context_features: of a context [N, context_features]; None for none.
        reversible: train in the memory of one coupling; :func:`fastgen.flows.reversible`.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        features: int,
        *,
        num_couplings: int = 4,
        hidden_features: int = 1000,
        num_layers: int = 5,
        context_features: int | None = None,
        reversible: bool = False,
    ) -> None:
        config = {
            "features": features,
            "num_couplings": num_couplings,
            "hidden_features": hidden_features,
            "num_layers": num_layers,
            "context_features": context_features,
            "reversible": reversible,
        }
        check_vector("NICE", config, "num_couplings", "hidden_features", "num_layers")
        couplings = []
        for i in range(num_couplings):
            transformed = range(1 - i % 2, features, 2)
            network = MLP(
                features - len(transformed),
                len(transformed),
                hidden_features=hidden_features,
                num_layers=num_layers,
                context_features=context_features,
            )
            couplings.append(AdditiveCoupling(network, mask=transformed, channels=features))
        scaling = ActNorm(features, initialize=False)
        super().__init__(config, stack([*couplings, scaling], reversible=reversible), (features,))
