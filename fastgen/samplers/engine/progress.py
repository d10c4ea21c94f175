"""The progress bar of a trajectory."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress_bar(steps: Iterable[T], shown: bool) -> Iterable[T]:
    """``steps`` with a bar where that is wanted and somebody can see it: silent where standard error is no terminal."""
    return tqdm(steps, disable=None if shown else True, unit="step", leave=False)
