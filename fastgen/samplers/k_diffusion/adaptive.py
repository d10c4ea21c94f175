"""DPM-Solver with adaptive steps, k-diffusion's `sample_dpm_adaptive`: the one sampler whose table is not known beforehand."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...ops import sampler_step
from ..engine.table import coefficient_table
from ..solvers.stochastic import ancestral_split
from .running import Callback, ExtraArgs, Model, NoiseSampler, check_ends, default_noise_sampler


class PIDStepSizeController:
    """The step size from the last three errors (Söderlind 2003), as k-diffusion parametrises it."""

    def __init__(
        self, h: float, pcoeff: float, icoeff: float, dcoeff: float, order: float = 1,
        accept_safety: float = 0.81, eps: float = 1e-8,
    ) -> None:  # fmt: skip
        self.h, self.accept_safety, self.eps = h, accept_safety, eps
        self.powers = ((pcoeff + icoeff + dcoeff) / order, -(pcoeff + 2 * dcoeff) / order, dcoeff / order)
        self.inverses: list[float] = []

    def propose_step(self, error: float) -> bool:
        """Set the next step size; whether the step with this error is accepted."""
        inverse = 1 / (error + self.eps)
        self.inverses = [inverse, *(self.inverses[1:] or [inverse, inverse])]
        factor = math.prod(v**p for v, p in zip(self.inverses, self.powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        accept = factor >= self.accept_safety
        if accept:
            self.inverses = [inverse, inverse, self.inverses[1]]
        self.h *= factor
        return accept


@torch.no_grad()
def sample_dpm_adaptive(
    model: Model, x: Tensor, sigma_min: float, sigma_max: float, extra_args: ExtraArgs = None,
    callback: Callback | None = None, disable: bool | None = None, order: int = 3, rtol: float = 0.05, atol: float = 0.0078,
    h_init: float = 0.05, pcoeff: float = 0.0, icoeff: float = 1.0, dcoeff: float = 0.0, accept_safety: float = 0.81,
    eta: float = 0.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None, return_info: bool = False,
) -> Any:  # fmt: skip
    """DPM-Solver-12 or 23 with adaptive steps (Lu et al. 2022a, appendix C); waits for the device once a step, for the error."""
    check_ends(sigma_min, sigma_max)
    if order not in (2, 3):
        raise ValueError(f"order must be 2 or 3, got {order}")
    forward = sigma_min < sigma_max
    if eta and not forward:
        raise ValueError("eta must be 0 where sigma goes up")
    draw = noise_sampler or default_noise_sampler(x)
    kwargs = dict(extra_args or {})
    at, end = -math.log(sigma_max), -math.log(sigma_min)
    pid = PIDStepSizeController(
        abs(h_init) if forward else -abs(h_init), pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety
    )
    info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    previous = x

    def denoise(x: Tensor, sigma: float) -> Tensor:
        bar.update()
        return model(x, x.new_full((len(x),), sigma), **kwargs)

    with tqdm(disable=disable) as bar:
        while at < end - 1e-5 if forward else at > end + 1e-5:
            target = min(end, at + pid.h) if forward else max(end, at + pid.h)
            sigma, sigma_next, down, up = math.exp(-at), math.exp(-target), math.exp(-target), 0.0
            if eta:
                down = max(ancestral_split(sigma, sigma_next, eta)[0], sigma_min)
                up = math.sqrt(max(sigma_next**2 - down**2, 0.0))
            low, high, denoised = _embedded_step(denoise, x, sigma, down, order)
            scale = torch.maximum(low.abs(), previous.abs()).mul_(rtol).clamp_min_(atol)
            error = float(torch.linalg.norm((low - high) / scale)) / math.sqrt(x.numel())
            if pid.propose_step(error):
                previous, x = low, high
                if eta:
                    x = x + up * s_noise * draw(x.new_tensor(sigma), x.new_tensor(sigma_next))
                at = target
                info["n_accept"] += 1
            else:
                info["n_reject"] += 1
            info["nfe"] += order
            info["steps"] += 1
            if callback is not None:
                now = x.new_tensor(math.exp(-at))
                place = {"sigma": now, "sigma_hat": now, "x": x, "i": info["steps"] - 1, "denoised": denoised}
                callback({**place, "error": error, "h": pid.h, **info})
    return (x, info) if return_info else x


def _embedded_step(
    denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigma: float, sigma_next: float, order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(lower order, higher order, denoised): each update one kernel over x and the predictions so far."""
    h, r1, r2 = math.log(sigma / sigma_next), (1 / 2 if order == 2 else 1 / 3), 2 / 3
    at = [sigma, sigma * math.exp(-r1 * h), sigma * math.exp(-r2 * h)]
    points, predictions = [x], [denoise(x, sigma)]

    def update(to: float, changes: Mapping[int, float]) -> Tensor:
        """x + (to - sigma) eps_0 + sum_k changes_k (eps_k - eps_0), eps_k = (points_k - predictions_k) / at_k."""
        weights = [(to - sigma) - sum(changes.values()), *(changes.get(k, 0.0) for k in range(1, len(predictions)))]
        terms = [(1 + weights[0] / sigma, x), (-weights[0] / sigma, predictions[0])]
        for k in range(1, len(predictions)):
            terms += [(weights[k] / at[k], points[k]), (-weights[k] / at[k], predictions[k])]
        return _combined(terms)

    points.append(update(at[1], {}))
    predictions.append(denoise(points[1], at[1]))
    second = {1: -sigma_next / (2 * r1) * math.expm1(h)}
    if order == 2:
        return update(sigma_next, {}), update(sigma_next, second), predictions[0]
    points.append(update(at[2], {1: -at[2] * (r2 / r1) * (math.expm1(r2 * h) / (r2 * h) - 1)}))
    low = update(sigma_next, second)
    predictions.append(denoise(points[2], at[2]))
    return low, update(sigma_next, {2: -sigma_next / r2 * (math.expm1(h) / h - 1)}), predictions[0]


def _combined(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The sum of weighted tensors, in one kernel."""
    (a, x), (b, y), *rest = terms
    table = coefficient_table([{"sample": a, "model": b}], [[weight for weight, _ in rest]])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    result: Any = sampler_step(x, y, table.to(x.device, wide), 0, history=[tensor for _, tensor in rest])
    return result
