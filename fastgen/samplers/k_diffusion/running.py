"""How k-diffusion's samplers are run: a formula traced over the levels it was given, then one kernel a step."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..engine.brownian import BrownianTree
from ..engine.compile import compile_trace
from ..engine.noise import draw_like, spread_noise
from ..engine.path import Path
from ..engine.plan import Plan
from ..engine.prediction import Prediction
from ..engine.trace import Symbol, Trace
from ..solvers.stochastic import NO_CHURN

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], None]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]
ExtraArgs = Mapping[str, Any] | None


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """Independent noise of torch's global generator."""
    return lambda sigma, sigma_next: draw_like(x)


class BrownianTreeNoiseSampler:
    """``f(sigma, sigma_next)``: noise of one Brownian path a seed; see :class:`fastgen.samplers.BrownianTree`.

    Args:
        x: [N, *], whose shape, dtype and device the noise has.
        sigma_min, sigma_max: the ends.
        seed: one, from which sample n takes seed + n, or one a sample; drawn by torch where None.
    """

    def __init__(self, x: Tensor, sigma_min: float, sigma_max: float, seed: int | Sequence[int] | None = None) -> None:
        self.tree = BrownianTree.like(x, float(sigma_min), float(sigma_max), seed)

    def __call__(self, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        return self.tree(sigma, sigma_next)


def brownian_unless_given(x: Tensor, sigmas: Tensor, noise_sampler: NoiseSampler | None) -> NoiseSampler:
    if noise_sampler is not None:
        return noise_sampler
    return BrownianTreeNoiseSampler(x, float(sigmas[sigmas > 0].min()), float(sigmas.max()))


def check_ends(sigma_min: float, sigma_max: float) -> None:
    if not sigma_min > 0 or not sigma_max > 0:
        raise ValueError(f"sigma_min and sigma_max must be above 0, got {sigma_min} and {sigma_max}")


def run(
    formula: Callable[..., None],
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs,
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None = None,
    **options: Any,
) -> Tensor:
    """Trace ``formula`` over ``sigmas`` and follow it."""
    levels = _checked(sigmas)
    plan = _planned(formula, tuple(levels), tuple(options.items()))
    churn = options.get("churn", NO_CHURN)
    unused = set()
    if churn.s_churn > 0:  # steps whose noise k-diffusion draws and leaves
        unused = {i for i, s in enumerate(levels[:-1]) if churn.sigma_hat(s, len(levels)) == s}
    return follow(plan, model, x, len(levels) - 1, extra_args, callback, disable, noise_sampler, sigmas, unused)


def _checked(sigmas: Tensor) -> list[float]:
    """The levels on the host; the one wait for the device."""
    if not isinstance(sigmas, Tensor) or sigmas.dim() != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas must be a tensor of at least two levels, got {sigmas!r}")
    levels = sigmas.detach().double().tolist()
    if any(b >= a for a, b in itertools.pairwise(levels)) or levels[-1] < 0:
        raise ValueError(f"sigmas must go down, to 0 or above, got {levels}")
    return levels


@functools.lru_cache(maxsize=64)
def _planned(formula: Callable[..., None], levels: tuple[float, ...], options: tuple[tuple[str, Any], ...]) -> Plan:
    trace = Trace(Prediction(prediction_type="sample"), scale_inputs=False)
    formula(trace, Path(levels[:-1], [1.0] * len(levels), levels, float), **dict(options))
    return compile_trace(trace)


@torch.no_grad()
def follow(
    plan: Plan,
    model: Model,
    x: Tensor,
    steps: int,
    extra_args: ExtraArgs,
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None,
    sigmas: Tensor | None = None,
    unused_noise: AbstractSet[int] = frozenset(),
) -> Tensor:
    plan = plan.to(x.device, x.dtype)
    kwargs = dict(extra_args or {})
    at = torch.tensor([stage.sigma for stage in plan.stages], dtype=x.dtype, device=x.device)
    history: dict[Symbol, Tensor] = {}
    step = -1
    with tqdm(total=steps, disable=disable) as bar:
        for j, stage in enumerate(plan.stages):
            denoised = x
            if stage.calls_model:
                if not stage.between and step + 1 in unused_noise:
                    draw_like(x)
                denoised = model(x, at[j].expand(len(x)), **kwargs)
                if not stage.between:
                    step += 1
                    bar.update()
                    if callback is not None:
                        sigma = at[j] if sigmas is None else sigmas[step]
                        callback({"x": x, "i": step, "sigma": sigma, "sigma_hat": at[j], "denoised": denoised})
            noise = None
            if plan.draws_noise[j]:
                if noise_sampler is None or stage.interval is None:
                    noise = draw_like(x)
                else:
                    noise = spread_noise(
                        noise_sampler(*(x.new_tensor(s) for s in stage.interval)), x, "the noise of noise_sampler"
                    )
            x = plan.step(denoised, j, x, history=history, noise=noise)
    return x
