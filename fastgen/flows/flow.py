"""`Flow`: a density: a transform to the latent, and the latent's distribution."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import StandardNormal
from .multi_scale import MultiScale
from .transform import Compose, Context, Transform, first_not_finite

MAX_SEED = 2**63 - 1


class Density:
    """What :class:`Flow` and the models have in common: densities and samples by ``self.transform`` and ``self.base``."""

    transform: Transform
    base: StandardNormal

    # Whether log_prob looks at its result, to name the layer that overflowed. None: on a CPU, where looking costs nothing; on a GPU
    # it would wait for the device.
    check_finite: bool | None = None

    def forward(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Data [N, *] -> (latent, log |det d latent / d data|, [N])."""
        return self.transform(self._checked(x), self._context(context))

    def inverse(self, z: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        """Latent [N, *] -> (data, log |det d data / d latent|, [N])."""
        return self.transform.inverse(z, self._context(context))

    def log_prob(self, x: Tensor, context: Context = None) -> Tensor:
        """log p(x | context) in nats: [N, *] -> [N], float32, or float64 for float64.

        Raises:
            ValueError: a shape does not fit; or ``x`` is not finite, where the result is looked at (:attr:`check_finite`).

        Warns:
            RuntimeWarning: the result is not finite although ``x`` is; the message names the layer.
        """
        x, context = self._checked(x), self._context(context)
        if isinstance(self.transform, MultiScale):
            nats = self.transform.log_prob(x, context)
        else:
            z, log_det = self.transform(x, context)
            nats = self.base.log_prob(z) + log_det
        if _looks(self.check_finite, nats) and not nats.isfinite().all():
            self._explain(x, context)
        return nats

    def bits_per_dim(self, x: Tensor, context: Context = None, *, levels: int = 256) -> Tensor:
        """Bits a dimension of the discrete image of which ``x`` in [0, 1) is the dequantised one: :func:`bits_per_dim`, [N]."""
        return bits_per_dim(self.log_prob(x, context), math.prod(x.shape[1:]), levels=levels)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Context = None,
        *,
        seeds: Tensor | Sequence[int] | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """[n, *] samples.

        Args:
            n: how many.
            context: as in :meth:`log_prob`, for each of the n.
            seeds: n integers: a sample depends on its own alone, not on those beside it; None draws them by torch's generator.
            temperature: the deviation of the latent, below 1 for samples nearer to the modes.

        Raises:
            ValueError: there are not n seeds, or the temperature is negative or not finite.
        """
        return self.inverse(self._drawn(n, context, seeds, temperature), context)[0]

    def _drawn(self, n: int, context: Context, seeds: Tensor | Sequence[int] | None, temperature: float) -> Tensor:
        """Latents of n samples."""
        name = type(self).__name__
        if not 0 <= temperature < math.inf:
            raise ValueError(f"{name}: temperature must be finite and not negative, got {temperature}")
        dtype, device = self._kind()
        if seeds is None:
            seeds = torch.randint(MAX_SEED, (n,))
        seeds = torch.as_tensor(seeds, dtype=torch.int64).to(device)
        if seeds.shape != (n,):
            raise ValueError(f"{name}: seeds must be [n] = [{n}], got shape {tuple(seeds.shape)}")
        return self._latent(seeds, temperature, dtype, context)

    def _latent(self, seeds: Tensor, temperature: float, dtype: torch.dtype, context: Context) -> Tensor:
        """[N, *] of the base, for a context [N, *]."""
        return self.base.sample(seeds, temperature, dtype=dtype)

    def _checked(self, x: Tensor) -> Tensor:
        """``x``, unless it is not what the transform takes."""
        return x

    def _context(self, context: Context) -> Context:
        """What the layers get of the context."""
        return context

    def _kind(self) -> tuple[torch.dtype, torch.device]:
        for tensor in self.transform.parameters():
            if tensor.is_floating_point():
                return tensor.dtype, tensor.device
        return torch.get_default_dtype(), torch.get_default_device()

    @torch.no_grad()
    def _explain(self, x: Tensor, context: Context) -> None:
        name = type(self).__name__
        if not x.isfinite().all():
            bad = int((~x.flatten(1).isfinite().all(1)).nonzero()[0])
            raise ValueError(f"{name}: x must be finite, got NaN or infinity in sample {bad}")
        transform = self.transform
        if isinstance(transform, MultiScale):
            found = transform.first_not_finite(x, context)
        else:
            found = first_not_finite(transform.layers if isinstance(transform, Compose) else [transform], x, context)
        where = "the latent is finite, its log-probability is not" if found is None else f"layer {found[0]} {found[1]}"
        singular = found is not None and found[1] == "is singular"
        advice = "" if singular else "; a bounded scale_fn such as 'tanh' keeps it in range"
        warnings.warn(
            f"{name}: log_prob is not finite: {where}{advice}",
            RuntimeWarning,
            stacklevel=3,
        )


class Flow(Density, nn.Module):
    """p(x) = N(f(x); 0, I) |det df/dx|.

    Args:
        transform: f, from data to the latent.
        base: the distribution of the latent.

    Example::

        flow = Flow(Compose([AffineCoupling(ResidualMLP(32, 64), features=64)]), StandardNormal((64,)))
        nats = flow.log_prob(x)
        samples = flow.sample(16, seeds=range(16), temperature=0.7)
    """

    def __init__(self, transform: Transform, base: StandardNormal) -> None:
        super().__init__()
        self.transform, self.base = transform, base


def bits_per_dim(log_prob: Tensor, dimensions: int, *, levels: int = 256) -> Tensor:
    """-log2 p / D + log2(levels): bits a dimension of integers 0 to ``levels`` - 1, where p is a density of (integer + u) / levels.

    Args:
        log_prob: in nats.
        dimensions: D, numbers a sample.
        levels: values that a number can take.

    Source: Theis et al. 2016 (A note on the evaluation of generative models).
    """
    return log_prob / (-math.log(2) * dimensions) + math.log2(levels)


def _looks(check: bool | None, nats: Tensor) -> bool:
    if torch.compiler.is_compiling() or nats.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(nats):
        return False
    return nats.is_cpu if check is None else check
