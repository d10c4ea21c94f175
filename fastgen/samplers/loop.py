"""`sample`: the loop from noise to images, for any model and any solver.

Inside the loop there is the model, one kernel a step and nothing else: no host-device synchronisation, no arithmetic on
tensors. Coefficients and timesteps are on the device before it begins, and a step writes over its own sample where nobody
else holds it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arguments import (
    check_classes,
    check_device,
    check_dtype,
    check_inpainting,
    check_kwargs,
    check_model,
    check_shape,
    check_start,
)
from .engine.brownian import BrownianTree
from .engine.compile import check_guidance_scale
from .engine.memory import nobody_else_holds
from .engine.noise import Generators, NoiseSource
from .engine.plan import Plan
from .engine.progress import progress_bar
from .engine.trace import Symbol
from .guidance import ClassifierFreeGuidance, Guidance, Model
from .guidance.base import ALONE, Call
from .solvers import Solver, make_solver

Callback = Callable[[int, float, Tensor], None]


@torch.no_grad()
def sample(
    model: Model | None,
    shape: Sequence[int],
    solver: Solver | str = "dpmpp_2m",
    *,
    steps: int,
    seeds: Tensor | Sequence[int] | None = None,
    generator: Generators = None,
    guidance_scale: float = 1.0,
    guidance: Guidance | None = None,
    classes: Tensor | Sequence[int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    noise: Tensor | None = None,
    brownian: bool = False,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    callback: Callback | None = None,
    progress: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw samples.

    Args:
        model: ``model(x, t, **kwargs)`` with x [N, C, *] and t [N] (int64, or float32 where a solver looks between timesteps),
            returning the prediction, [N, C, *] or, for a solver with learned variance, [N, 2C, *].
        shape: [N, C, *].
        solver: say ``DDIM(betas=squared_cosine_betas())``, or a name of :data:`fastgen.samplers.SOLVERS` for its defaults.
        steps: of the trajectory.
        seeds: N integers. The fused mode: all noise is drawn in the kernel, and an image depends on its seed alone.
        generator: None, one, or one a sample. The compatible mode: all noise is torch's, in diffusers' order.
        guidance_scale: w of classifier-free guidance; at 1 the model is called without doubling the batch.
        guidance: any other of :mod:`fastgen.samplers.guidance`; it holds its model and conditions, so ``model`` may be None then.
        classes: [N] labels, passed to the model as ``y``; checked against the model's ``num_classes`` where it has one.
        model_kwargs: further keyword arguments of the model.
        uncond_kwargs: those that replace them in the unconditional half; for ``classes`` it is the model's
            ``null_label`` without asking.
        noise: [N, C, *], the start of the trajectory; drawn where it is None.
        brownian: with ``seeds`` and a stochastic solver of sigma space: its noise is cut out of one Brownian path a seed, so
            more steps follow the same path more closely; costs some 20 draws a step instead of one.
        known, mask: inpainting, both broadcastable to ``shape``: where ``mask`` is 0 the samples follow the noised known
            image and end in it.
        callback: called as ``callback(i, t, x)`` after each step.
        progress: show a progress bar where standard error is a terminal.
        dtype: of the samples.
        device: of the samples; that of the model's first parameter, or the CPU.

    Returns:
        [N, C, *], as the last step leaves them.

    Raises:
        TypeError: an argument is of the wrong kind; the message names it, here and in the other errors.
        ValueError: an argument does not fit.
    """
    run, x = prepare(
        model, shape, solver, steps=steps, seeds=seeds, generator=generator, guidance_scale=guidance_scale, guidance=guidance,
        classes=classes, model_kwargs=model_kwargs, uncond_kwargs=uncond_kwargs, noise=noise, brownian=brownian, known=known,
        mask=mask, dtype=dtype, device=device,
    )  # fmt: skip
    return run.follow(x, owned=noise is None, callback=callback, progress=progress)


@dataclass(frozen=True)
class Run:
    """A trajectory set up: everything on the device, nothing left to do but the model and one kernel a step."""

    plan: Plan
    predict: Guidance
    source: NoiseSource
    timesteps: Tensor
    tree: BrownianTree | None
    inpainting: dict[str, Tensor]

    def follow(
        self, x: Tensor, *, owned: bool = True, callback: Callback | None = None, progress: bool = False
    ) -> Tensor:
        """From ``x`` to the samples; ``owned``: nobody else wants the memory of ``x``."""
        plan, calls = self.plan, self.plan.calls()
        history: dict[Symbol, Tensor] = {}
        for i, t in enumerate(progress_bar(plan.timesteps, progress)):
            stage = plan.stages[i]
            model_output, uncond = x, None
            if stage.calls_model:
                model_output, uncond = self.predict(x.detach(), self.timesteps[i].expand(len(x)), calls[i])
            # else the model, or whoever gave x or is shown it, has kept it
            ours = owned and callback is None and not stage.keeps_sample and nobody_else_holds(x)
            drawn: dict[str, Tensor] = {}
            if plan.draws_noise[i]:
                drawn = {"noise": self.tree(*stage.interval)} if self.tree and stage.interval else self.source.step()
            x = plan.step(
                model_output, i, x, history=history, uncond=uncond, out=x if ours and model_output is not x else None,
                **drawn, **self.inpainting,
            )  # fmt: skip
            owned = True
            if callback is not None:
                callback(i, t, x)
        return x


def prepare(
    model: Model | None,
    shape: Sequence[int],
    solver: Solver | str,
    *,
    steps: int,
    seeds: Tensor | Sequence[int] | None = None,
    generator: Generators = None,
    guidance_scale: float = 1.0,
    guidance: Guidance | None = None,
    classes: Tensor | Sequence[int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    noise: Tensor | None = None,
    brownian: bool = False,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Run, Tensor]:
    """Check the arguments of `sample` and put what they need on the device; the run, and where it starts."""
    shape = check_shape(shape)
    check_dtype(dtype)
    check_model(model, guidance)
    check_guidance_scale(guidance_scale)
    chosen = _solver(solver)
    place = check_device(device, model)
    source = NoiseSource(shape, place, dtype, seeds, generator)
    kwargs = check_kwargs("model_kwargs", model_kwargs)
    if classes is not None:
        if "y" in kwargs:
            raise ValueError("give classes or model_kwargs['y'], not both")
        kwargs["y"] = check_classes(classes, shape[0], model).to(place)
    predict = _guidance(guidance, model, kwargs, guidance_scale, check_kwargs("uncond_kwargs", uncond_kwargs))
    plan = chosen.plan(steps, guidance_scale=predict.scale).to(place, dtype)
    tree = _brownian_tree(plan, source, shape, place, dtype) if brownian else None

    x = check_start(noise, shape, place, dtype) if noise is not None else source.initial()
    inpainting = check_inpainting(known, mask, shape, place, dtype)
    if inpainting:
        inpainting["known_noise"] = source.known()
    return Run(plan, predict, source, _on_device(plan.timesteps, place), tree, inpainting), x


def _brownian_tree(
    plan: Plan, source: NoiseSource, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> BrownianTree:
    if source.seeds is None:
        raise ValueError("brownian=True needs seeds")
    ends = [s for stage in plan.stages if stage.interval for s in stage.interval if s > 0]
    if not ends:
        raise ValueError("brownian=True needs a stochastic solver in sigma space, such as 'dpmpp_2m_sde'")
    # the ends of the schedule, not of this trajectory, so that other step counts see the same path
    return BrownianTree(source.seeds, shape, min(1e-3, min(ends)), max(1e3, max(ends)), dtype=dtype, device=device)


def _on_device(timesteps: Sequence[float], device: torch.device) -> Tensor:
    """The model's timesteps: int64 where all are whole, else float32."""
    whole = all(float(t).is_integer() for t in timesteps)
    return torch.tensor(
        [int(t) if whole else t for t in timesteps], device=device, dtype=torch.int64 if whole else torch.float32
    )


def _solver(solver: Solver | str) -> Solver:
    if isinstance(solver, str):
        return make_solver(solver)
    if not isinstance(solver, Solver):
        what = f"the class {solver.__name__}: call it" if isinstance(solver, type) else type(solver).__name__
        raise TypeError(f"solver must be a Solver or a name of SOLVERS, got {what}")
    return solver


class _Unguided(Guidance):
    def __init__(self, model: Model, kwargs: Mapping[str, Any]) -> None:
        self.model, self.kwargs = model, kwargs

    def __call__(self, x: Tensor, t: Tensor, call: Call = ALONE) -> tuple[Tensor, None]:
        return self.model(x, t, **self.kwargs), None


def _guidance(
    guidance: Guidance | None,
    model: Model | None,
    kwargs: Mapping[str, Any],
    guidance_scale: float,
    uncond_kwargs: Mapping[str, Any],
) -> Guidance:
    """The guidance given, or that of the arguments."""
    if guidance is not None:
        if guidance_scale != 1 or kwargs or uncond_kwargs:
            raise ValueError(
                "a guidance has its own scale and conditions: give no guidance_scale, classes or kwargs with it"
            )
        return guidance
    if model is None:
        raise AssertionError("check_model lets no model be None without a guidance")
    if guidance_scale == 1:
        return _Unguided(model, kwargs)
    uncond = {**kwargs, **uncond_kwargs}
    if "y" in kwargs and "y" not in uncond_kwargs:
        null_label = getattr(model, "null_label", None)
        if null_label is None:
            raise ValueError("guidance needs uncond_kwargs: the model has no null_label to stand for no class")
        uncond["y"] = torch.full_like(kwargs["y"], null_label)
    if not uncond_kwargs and "y" not in kwargs:
        raise ValueError(
            "guidance_scale other than 1 needs a condition: give classes, or model_kwargs and uncond_kwargs"
        )
    return ClassifierFreeGuidance(model, kwargs, uncond, guidance_scale)
