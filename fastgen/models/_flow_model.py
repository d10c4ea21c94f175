"""`FlowModel`: what every flow here promises: densities, samples, both directions with log-dets, a config and files."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..flows import Compose, Density, Reversible, StandardNormal, Transform
from ..nn._square_matrix import PARAMETRIZATIONS
from ._configured import Configured, check_positive


class FlowModel(Density, Configured):
    """A :class:`Configured` density; a subclass hands over its transform.

    Args:
        config: the arguments of the class's constructor, ready for JSON.
        transform: from data to the latent.
        shape: of a sample, where all have the same.
        latent_shape: of its latent; ``shape`` where None.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        transform: Transform,
        shape: Sequence[int],
        latent_shape: Sequence[int] | None = None,
    ) -> None:
        Configured.__init__(self, config)
        self.transform = transform
        self.base = StandardNormal(shape if latent_shape is None else latent_shape)
        self.shape = tuple(shape)

    def _checked(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape or not x.is_floating_point():
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(
                f"{type(self).__name__}: x must be floating, [N, {wanted}], got {x.dtype} of {tuple(x.shape)}"
            )
        return x


def stack(layers: Sequence[Transform], *, reversible: bool, keep_last: bool = True) -> Compose:
    """``layers`` one after the other, trained in the memory of one of them where ``reversible``."""
    return Reversible(layers, keep_last=keep_last) if reversible else Compose(layers)


def check_parametrization(name: str, parametrization: str) -> None:
    """Raise ValueError where 1x1 convolutions cannot have their matrices so."""
    if parametrization not in PARAMETRIZATIONS:
        raise ValueError(f"{name}: parametrization must be one of {PARAMETRIZATIONS}, got {parametrization!r}")


def alternating(i: int, checkerboard: bool = False) -> str:
    """The mask of the i-th of couplings that take turns."""
    if checkerboard:
        return "checkerboard_inverse" if i % 2 else "checkerboard"
    return "first_half" if i % 2 else "second_half"


def check_vector(name: str, config: Mapping[str, Any], *counts: str) -> None:
    """Raise ValueError for a config of vectors that cannot be halved, or of which one of ``counts`` is no positive integer."""
    check_positive(name, config, "features", *counts)
    check_positive(name, config, "context_features", optional=True)
    if config["features"] < 2:
        raise ValueError(
            f"{name}: features must be at least 2, of which a coupling keeps one, got {config['features']}"
        )
