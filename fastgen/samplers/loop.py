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
from tqdm import tqdm

from .engine.brownian import BrownianTree
from .engine.noise import Generators, NoiseSource
from .engine.plan import Plan
from .engine.trace import Symbol
from .guidance import ClassifierFreeGuidance, Guidance, Model
from .guidance.base import ALONE, Call
from .solvers import Solver, make_solver

Callback = Callable[[int, int, Tensor], None]


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
        generator: None, one, or one a sample. The compatible mode: all noise is drawn by torch, in diffusers' order.
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
        progress: show a progress bar.
        dtype: of the samples.
        device: of the samples; that of the model's first parameter, or the CPU.

    Returns:
        [N, C, *], as the last step leaves them.

    Raises:
        TypeError: ``dtype`` is not floating-point, or seeds are no integers.
        ValueError: an argument does not fit; the message names it.
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
        for i, t in enumerate(tqdm(plan.timesteps, disable=None if progress else True, unit="step", leave=False)):
            stage = plan.stages[i]
            holders = _holders(x)
            model_output, uncond = x, None
            if stage.calls_model:
                model_output, uncond = self.predict(x.detach(), self.timesteps[i].expand(len(x)), calls[i])
            # else the model, or whoever gave x or is shown it, has kept it
            ours = owned and callback is None and not stage.keeps_sample and _holders(x) == holders
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
    shape = tuple(shape)
    if len(shape) < 2:
        raise ValueError(f"shape must be [N, C, *], got {shape}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating-point, got {dtype}")
    place = torch.device(device) if device is not None else _device_of(model)
    source = NoiseSource(shape, place, dtype, seeds, generator)
    chosen = make_solver(solver) if isinstance(solver, str) else solver
    kwargs = dict(model_kwargs or {})
    if classes is not None:
        if "y" in kwargs:
            raise ValueError("give classes or model_kwargs['y'], not both")
        kwargs["y"] = _check_classes(classes, shape[0], model).to(place)
    predict = _guidance(guidance, model, kwargs, guidance_scale, uncond_kwargs)
    plan = chosen.plan(steps, guidance_scale=predict.scale).to(place, dtype)
    tree = _brownian_tree(plan, source, shape, place, dtype) if brownian else None

    x = _check_start(noise, shape, place, dtype) if noise is not None else source.initial()
    inpainting = _inpainting(known, mask, shape, place, dtype, source)
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


def _holders(x: Tensor) -> int:
    """How many tensors share the memory of ``x``: the same before and after a model that keeps nothing of it."""
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def _on_device(timesteps: Sequence[float], device: torch.device) -> Tensor:
    """The model's timesteps: int64 where all are whole, else float32."""
    whole = all(float(t).is_integer() for t in timesteps)
    return torch.tensor(
        [int(t) if whole else t for t in timesteps], device=device, dtype=torch.int64 if whole else torch.float32
    )


def _device_of(model: Model | None) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def _check_classes(classes: Tensor | Sequence[int], n: int, model: Model | None) -> Tensor:
    """Labels as int64. Out of range, they would be an assertion on the device that ends the process's use of it."""
    labels = torch.as_tensor(classes)
    if labels.shape != (n,) or labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"classes must be [N] = [{n}] integers, got shape {tuple(labels.shape)} of {labels.dtype}")
    num_classes, null_label = getattr(model, "num_classes", None), getattr(model, "null_label", None)
    if isinstance(num_classes, int):
        known = num_classes + (null_label == num_classes)
        wrong = sorted({label for label in labels.tolist() if not 0 <= label < known})
        if wrong:
            raise ValueError(f"classes must be in [0, {known}), got {wrong}")
    return labels.long()


def _check_start(noise: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if noise.shape != shape:
        raise ValueError(f"noise must have the shape {shape} of the samples, got {tuple(noise.shape)}")
    return noise.to(device, dtype)


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
    uncond_kwargs: Mapping[str, Any] | None,
) -> Guidance:
    """The guidance given, or that of the arguments."""
    if guidance is not None:
        if guidance_scale != 1 or kwargs or uncond_kwargs:
            raise ValueError(
                "a guidance has its own scale and conditions: give no guidance_scale, classes or kwargs with it"
            )
        return guidance
    if model is None:
        raise ValueError("model may be None only with a guidance, which holds its own")
    if guidance_scale == 1:
        return _Unguided(model, kwargs)
    uncond = {**kwargs, **(uncond_kwargs or {})}
    if "y" in kwargs and "y" not in (uncond_kwargs or {}):
        null_label = getattr(model, "null_label", None)
        if null_label is None:
            raise ValueError("guidance needs uncond_kwargs: the model has no null_label to stand for no class")
        uncond["y"] = torch.full_like(kwargs["y"], null_label)
    if not uncond_kwargs and "y" not in kwargs:
        raise ValueError(
            "guidance_scale other than 1 needs a condition: give classes, or model_kwargs and uncond_kwargs"
        )
    return ClassifierFreeGuidance(model, kwargs, uncond, guidance_scale)


def _inpainting(
    known: Tensor | None,
    mask: Tensor | None,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    source: NoiseSource,
) -> dict[str, Tensor]:
    if (known is None) != (mask is None):
        raise ValueError("known and mask come together")
    if known is None or mask is None:
        return {}
    spread = {}
    for name, tensor in (("known", known), ("mask", mask)):
        try:
            spread[name] = tensor.to(device, dtype).expand(shape).contiguous()
        except RuntimeError:
            raise ValueError(f"{name} must broadcast to {shape}, got shape {tuple(tensor.shape)}") from None
    return {**spread, "known_noise": source.known()}
