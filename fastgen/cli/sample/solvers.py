"""The solver that `fastgen sample` is asked for: its name, its options as NAME=VALUE, and the schedule the weights know."""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ...samplers import SOLVERS, SigmaSolver, Solver, make_solver
from ...training import SCHEDULES, TrainingRecord
from .._errors import UsageError, argument_errors

# Those for the schedule of betas that checkpoints are trained on.
SAMPLERS = sorted(
    name for name in SOLVERS if not name.startswith(("edm", "flow", "consistency", "lcm", "tcd", "repaint"))
)
LARGEST_SIGMA = 80.0  # where a cosine schedule goes on to 20,000, there is nothing left to see

# What the other options of the command decide, or a line of text cannot say.
_NOT_OPTIONS = {"betas", "prediction_type", "tau"}


def build_solver(args: argparse.Namespace, record: TrainingRecord, learned: bool) -> Solver:
    """The solver of ``args.sampler`` for weights trained as ``record`` says; ``learned``: they predict their variance too."""
    if learned and args.sampler != "ddpm":
        raise UsageError(
            f"--sampler {args.sampler} takes no learned variance, which these weights have: use --sampler ddpm"
        )
    schedule = args.schedule or record.schedule or "linear"
    prediction_type = args.prediction_type or record.prediction_type or "epsilon"
    timesteps = args.timesteps or record.timesteps or 1000
    if timesteps < 2:
        raise UsageError(
            f"--timesteps must be at least 2, got {timesteps}: one noise level is no way from noise to image"
        )
    betas = SCHEDULES[schedule](timesteps)
    common = {"betas": betas, "prediction_type": prediction_type}
    with argument_errors(f"--sampler {args.sampler}"):
        plain = make_solver(args.sampler, **common)
        given = _read_options(args, plain)
        return make_solver(args.sampler, **{**common, **_defaults(args.sampler, plain, learned), **given})


def _defaults(name: str, plain: Solver, learned: bool) -> dict[str, Any]:
    """What suits images in [-1, 1] and guidance better than the defaults of the class."""
    if name == "ddim":
        return {"use_clipped_model_output": True}
    if name == "ddpm":
        return {"variance_type": "learned_range" if learned else "fixed_small"}
    if isinstance(plain, SigmaSolver):
        highest = min(LARGEST_SIGMA, float(plain.train_sigmas()[-1]))
        return {"clip_sample": True, "sigma_spacing": "karras", "sigma_max": highest}
    return {"clip_sample": True}


def _read_options(args: argparse.Namespace, solver: Solver) -> dict[str, Any]:
    """``--eta`` and each ``--set NAME=VALUE``, read as what the option is by default."""
    defaults = {field.name: getattr(solver, field.name) for field in fields(solver) if field.name not in _NOT_OPTIONS}
    for field in fields(solver):
        if field.name in defaults and defaults[field.name] != field.default:
            del defaults[field.name]  # the name decides it, as dpmpp_3m the order
    given: Sequence[str] = [*([] if args.eta is None else [f"eta={args.eta!r}"]), *args.set]
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, got {text!r}")
        if name not in defaults:
            raise UsageError(
                f"--sampler {args.sampler} has no option {name!r}; its options are {', '.join(sorted(defaults))}"
            )
        options[name] = _value(name, value, defaults)
    return options


def _value(name: str, text: str, defaults: Mapping[str, Any]) -> Any:
    default = defaults[name]
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UsageError(f"--set {name}: must be true or false, got {text!r}")
        return text.lower() == "true"
    if isinstance(default, str):
        return text
    kind = int if isinstance(default, int) else float
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        wanted = "an integer" if kind is int else "a number"
        raise UsageError(f"--set {name}: must be {wanted}, got {text!r}")
    return value
