"""`gauss_seidel_jacobi`: the inverse of an autoregressive affine map, segment after segment, each by passes over all its tokens.

Liu & Qin 2025 (Accelerating TarFlow sampling with GS-Jacobi iteration); Song et al. 2021 (Accelerating feedforward computation via
parallel nonlinear equation solving).
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .transform import log_det_dtype


class Network(Protocol):
    """What gives the parameters (a, b) of each token, by those before it, which it keeps."""

    def begin(self, token: int) -> None:
        """Forget the tokens from this one on."""

    def __call__(self, tokens: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """(a, b) [N, S, D] of the tokens that follow each of ``tokens`` [N, S, D], of which the first is number ``first``."""


@dataclass(frozen=True)
class GaussSeidelJacobi:
    """How :func:`gauss_seidel_jacobi` goes.

    Args:
        segments: into which the tokens are cut, done one after the other; 1 for Jacobi iteration of all.
        tolerance: a segment is done when a pass changes none of its numbers by more. 0 goes on until nothing changes at all.
        max_passes: of a segment, at most; None for as many as it has tokens, after which it is exact.
        guess: of a segment, before the first pass: ``"latent"`` or ``"zeros"``.

    Raises:
        ValueError: an argument is out of its range.
    """

    segments: int = 1
    tolerance: float = 1e-5
    max_passes: int | None = None
    guess: str = "latent"

    def __post_init__(self) -> None:
        for name, value in (("segments", self.segments), ("max_passes", self.max_passes)):
            if value is not None and value < 1:
                raise ValueError(f"GaussSeidelJacobi: {name} must be at least 1, got {value}")
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"GaussSeidelJacobi: tolerance must be finite and not negative, got {self.tolerance}")
        if self.guess not in ("latent", "zeros"):
            raise ValueError(f"GaussSeidelJacobi: guess must be 'latent' or 'zeros', got {self.guess!r}")


@dataclass
class Passes:
    """What a run of :func:`gauss_seidel_jacobi` took, segment by segment."""

    tokens: list[int] = field(default_factory=list)  # of the segment
    passes: list[int] = field(default_factory=list)
    change: list[float] = field(default_factory=list)  # the largest, of the last pass

    @property
    def total(self) -> int:
        """Passes in all: token after token would take as many as there are tokens."""
        return sum(self.passes)


def gauss_seidel_jacobi(
    network: Network, z: Tensor, options: GaussSeidelJacobi, report: list[Passes] | None = None
) -> tuple[Tensor, Tensor]:
    r"""x with x_0 = z_0 and x_{t+1} = exp(a_t) z_{t+1} + b_t, where (a_t, b_t) depend on x_0 to x_t.

    .. math:: x^{(k+1)}_{t+1} = e^{a_t(x^{(k)})} z_{t+1} + b_t(x^{(k)}) \quad \text{for all } t \text{ of a segment}

    Each pass makes one more token of the segment final, so as many passes as it has tokens are exact; far fewer are enough where
    a token depends little on the one before it. All samples of the batch go on until the last of them stands still.

    Args:
        network: what gives a and b.
        z: [N, T, D].
        options: segments, tolerance, and so on.
        report: a list to which the :class:`Passes` are added.

    Returns:
        (x, the log-determinant [N]).
    """
    tokens = z.shape[1]
    x = z.clone() if options.guess == "latent" else torch.cat([z[:, :1], torch.zeros_like(z[:, 1:])], 1)
    log_det = torch.zeros(len(z), dtype=log_det_dtype(z), device=z.device)
    taken, count = Passes(), min(options.segments, max(tokens - 1, 1))
    for segment in range(count):
        first, last = segment * (tokens - 1) // count, (segment + 1) * (tokens - 1) // count
        most = last - first if options.max_passes is None else min(options.max_passes, last - first)
        if most == 0:  # of a single token, which is z_0
            continue
        done = 0
        for _ in range(most):
            done += 1
            network.begin(first)
            log_scale, shift = network(x[:, first:last], first)
            new = z[:, first + 1 : last + 1] * log_scale.exp() + shift
            change = float((new - x[:, first + 1 : last + 1]).abs().amax()) if new.numel() else 0.0
            x = torch.cat([x[:, : first + 1], new, x[:, last + 1 :]], 1)
            if change <= options.tolerance:
                break
        log_det = log_det + log_scale.to(log_det.dtype).sum((1, 2))
        taken.tokens.append(last - first)
        taken.passes.append(done)
        taken.change.append(change)
    if report is not None:
        report.append(taken)
    return x, log_det
