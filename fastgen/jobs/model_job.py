"""`ModelJob`: what jobs of the library's models have in common: a model that decides the bytes, its classes, and threads."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .job import Drawn, Job, Shard

SHOWN = 10  # classes in the settings


class ModelJob(Job):
    """A :class:`Job` that draws from ``model``, on its device.

    Products of torch on a CPU round differently on one thread and on several, by 1e-7 of their size, and now and then a pixel falls
    on the other side of a half for it. So the number of threads is one of the settings, the same for all ranks; what
    has cores left over is given more ranks.

    Args:
        model: in evaluation mode.
        num: of the examples.
        num_classes: those the model takes, None where it takes none.
        needs_class: nothing can be drawn without one.
        threads: of torch, while a shard is drawn.
        options: ``seed``, ``labels``, ``shard_size`` and ``batch_size``, as :class:`Job` takes them.

    Raises:
        TypeError, ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        num: int,
        *,
        num_classes: int | None,
        needs_class: bool,
        threads: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(num, **options)
        name = type(self).__name__
        if model.training:
            raise ValueError(f"{name}: model must be in evaluation mode, call its eval()")
        if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
            raise ValueError(f"{name}: threads must be an integer of at least 1, got {threads!r}")
        if self.labels is None:
            if needs_class:
                raise ValueError(f"{name}: labels are needed, nothing is drawn without one of {num_classes} classes")
        elif num_classes is None:
            raise ValueError(f"{name}: labels must be None for a model without classes")
        elif not ((self.labels >= 0) & (self.labels < num_classes)).all():
            low, high = (int(x) for x in self.labels.aminmax())
            raise ValueError(f"{name}: labels must be in [0, {num_classes}), got {low} to {high}")
        self.threads, self._model = threads, model

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def device(self) -> torch.device:
        """Where examples are drawn."""
        return next(self._model.parameters()).device

    @property
    def settings(self) -> dict[str, Any]:
        config = getattr(self._model, "config", None)  # sizes that the shapes of the weights do not say
        return {
            "classes": _in_words(self.labels),
            **super().settings,
            "shape": list(self.shape),
            "device": self.device.type,
            "threads": self.threads,
            "model": type(self._model).__name__,
            "config": dict(config) if isinstance(config, Mapping) else None,
        }

    def draw(self, shard: Shard) -> Drawn:
        with _threads(self.threads):
            return super().draw(shard)


def _in_words(labels: Tensor | None) -> str | None:
    """For who compares two jobs: the hash of the labels says no more than that they differ."""
    if labels is None:
        return None
    first = labels[:SHOWN].tolist()
    if labels.eq(first[0]).all():
        return f"all {first[0]}"
    return ", ".join(map(str, first)) + (", ..." if len(labels) > SHOWN else "")


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
