"""What ops with rational-quadratic splines take as their numbers: checks with the names that callers use."""

import math
from collections.abc import Sequence

from .._schema import SPLINE_PARAMETRIZATIONS, SPLINE_TAILS
from ._check import fail

# The least bin, as a fraction of the box, where a caller names none: zuko's bins are bounded by its soft clip instead.
LEAST_BIN = {"nflows": 1e-3, "zuko": 0.0}


def check_kinds(op: str, tails: str | None, parametrization: str) -> None:
    if tails not in SPLINE_TAILS:
        fail(op, f"tails must be one of {SPLINE_TAILS}, got {tails!r}")
    if parametrization not in SPLINE_PARAMETRIZATIONS:
        fail(op, f"parametrization must be one of {SPLINE_PARAMETRIZATIONS}, got {parametrization!r}")


def spline_numbers(
    op: str,
    bins: int,
    tails: str | None,
    bound: float | Sequence[float],
    min_bin_width: float | None,
    min_bin_height: float | None,
    min_derivative: float,
    parametrization: str,
    scale: float,
) -> list[float]:
    """SPLINE_NUMBERS, once kinds and bins are known to be right."""
    if isinstance(bound, (int, float)):
        box = (-float(bound), float(bound), -float(bound), float(bound))
    else:
        box = tuple(float(edge) for edge in bound)  # type: ignore[assignment]
    if len(box) != 4 or not (box[0] < box[1] and box[2] < box[3]):
        fail(op, f"bound must be a positive number or (left, right, bottom, top) in order, got {bound!r}")
    least = LEAST_BIN[parametrization]
    least_width, least_height = (least if given is None else float(given) for given in (min_bin_width, min_bin_height))
    for name, value in (("min_bin_width", least_width), ("min_bin_height", least_height)):
        if not 0 <= value * bins <= 1:
            fail(op, f"{name} must be in [0, 1 / K] with K = {bins}, got {value}")
    most = 1.0 if parametrization == "zuko" or tails == "linear" else math.inf
    if not 0 < min_derivative < most:
        fail(op, f"min_derivative must be in (0, {most}), got {min_derivative}")
    return [*box, least_width, least_height, float(min_derivative), float(scale)]
