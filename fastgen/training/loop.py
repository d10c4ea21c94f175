"""`TrainingLoop`: what is the same whatever is learned: optimiser steps, moving average, and an exact checkpoint."""

import copy
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .. import __version__
from ..models import AutoregressiveModel, FlowModel, UNet, load_state, save_state
from ..models.checkpoint import first_not_finite, json_metadata
from .callbacks import Callback
from .ema import EMA
from .options import OptimizerOptions
from .restoring import check_equal, check_random_states, check_tensors, read_step

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")

Model = TypeVar("Model", UNet, AutoregressiveModel, FlowModel)
Options = TypeVar("Options", bound=OptimizerOptions)


class TrainingLoop(Generic[Model, Options]):
    """A model in training; a subclass says what a batch is and what its loss.

    Args:
        model: it is trained in place.
        options: see :class:`OptimizerOptions`.
        images: [M, C, H, W] in [-1, 1]; of flows of tables rows [M, D].
        labels: [M] int64, None for a model without classes.
        device: of model and data.

    Attributes:
        step: how many steps have been done.
        ema: the moving average of the model, :class:`EMA`.

    Everything random comes from two generators whose states are part of the checkpoint: the trainer's own, which draws batches and
    what belongs to them on the CPU and is seeded by the options, and torch's global one on ``device`` (dropout). Initial weights
    are the model's own affair: call ``torch.manual_seed`` before it is built.
    """

    def __init__(
        self, model: Model, options: Options, images: Tensor, labels: Tensor | None, device: torch.device | str
    ) -> None:
        self.options = options
        self.device = torch.device(device)
        self.images = images.to(self.device)
        self.labels = None if labels is None else labels.to(self.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        # channels-last convolutions take up to a fifth less time, forward and backward, on CPUs too
        self.model: Model = model.to(self.device).train()
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema: EMA[Model] = EMA(self.model, options.ema_decay)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr)
        for parameter in self.model.parameters():  # Adam's own beginning, made here so that step 0 can be saved
            moments = {name: torch.zeros_like(parameter) for name in ADAM_MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        self.step = 0
        self._stopping = False

    def draw_batch(self) -> Any:
        """The next batch of the trainer's generator."""
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        """The loss of the model on ``batch``, a scalar."""
        raise NotImplementedError

    def after_backward(self) -> None:
        """What is done to the gradients before the optimiser has them: nothing."""

    def fit(self, last_step: int, callbacks: Iterable[Callback] = ()) -> None:
        """Train until :attr:`step` is ``last_step``, or until :meth:`stop`.

        Raises:
            FloatingPointError: the loss is not finite; the weights are those before that step.
        """
        callbacks = list(callbacks)
        self._stopping, failed = False, True
        for callback in callbacks:
            callback.on_start(self, last_step)
        try:
            while self.step < last_step and not self._stopping:
                loss = self.train_step()
                for callback in callbacks:
                    callback.on_step(self, loss)
            failed = False
        finally:
            for callback in callbacks:
                callback.on_end(self, failed)

    def stop(self) -> None:
        """End :meth:`fit` after the step it is in: for a callback or a signal handler."""
        self._stopping = True

    def train_step(self) -> float:
        """One optimiser step; returns the loss."""
        loss = self.loss(self.draw_batch())
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {self.step}: try a smaller learning rate")
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.after_backward()
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.model, self.step)
        return value

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that :meth:`restore` needs to one safetensors file, atomically.

        Raises:
            FloatingPointError: a weight or moment is not finite; nothing is written.
            OSError: the file cannot be written; what was there before is untouched.
        """
        state = dict(self._state())
        _refuse_not_finite(state, self.step)
        metadata = {
            "step": str(self.step),
            "options": json.dumps(asdict(self.options)),
            "config": json.dumps(self.model.config),
        }
        save_state(path, state, metadata)

    def save_weights(
        self,
        path: str | os.PathLike[str],
        recipe: str | None = None,
        dtype: torch.dtype | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the moving average as the model's own ``save`` does, with what samplers need to know of the training.

        Args:
            path: the file.
            recipe: the name of data, model and options together, for the record.
            dtype: of the weights in the file; that of the model where None.
            more: to go with the record, ready for JSON.

        Raises: as :meth:`save`.
        """
        average = self.ema.model if dtype is None else copy.deepcopy(self.ema.model).to(dtype)
        _refuse_not_finite(average.state_dict(), self.step)
        shape = {"image_shape": list(self.images.shape[1:])} if self.images.dim() == 4 else {}
        made = {**shape, "steps": self.step, "version": __version__}
        named = {} if recipe is None else {"recipe": recipe}
        average.save(path, {"training": json.dumps({**asdict(self.options), **named, **made, **(more or {})})})

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Continue from what :meth:`save` wrote, as if the run had never stopped.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is damaged, is no training checkpoint, or is of a run with other options; the message names
                file and field, and the trainer is as it was.
        """
        state, metadata = load_state(path)
        check_equal(path, "options", json_metadata(path, metadata, "options"), asdict(self.options))
        check_equal(path, "config", json_metadata(path, metadata, "config"), self.model.config)
        step = read_step(path, metadata)
        own = dict(self._state())
        check_tensors(path, state, own)
        check_random_states(path, {name: state[name] for name in own if name.startswith("random.")})
        with torch.no_grad():  # nothing below can fail
            for name, tensor in own.items():
                tensor.copy_(state[name])
        self.generator.set_state(state["random.trainer"])
        torch.set_rng_state(state["random.global"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random.cuda"], self.device)
        self.step = step
        for parameter in self.model.parameters():
            self.optimizer.state[parameter]["step"].fill_(step)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            yield f"model.{name}", tensor
        for name, tensor in self.ema.model.state_dict().items():
            yield f"ema.{name}", tensor
        for name, parameter in self.model.named_parameters():
            for moment in ADAM_MOMENTS:
                yield f"adam.{moment}.{name}", self.optimizer.state[parameter][moment]
        yield "random.trainer", self.generator.get_state()
        yield "random.global", torch.get_rng_state()
        if self.device.type == "cuda":
            yield "random.cuda", torch.cuda.get_rng_state(self.device)


def check_labels(name: str, labels: Tensor, m: int, num_classes: int) -> None:
    """Raise ValueError where ``labels`` are not [M] classes."""
    if labels.shape != (m,) or labels.dtype != torch.int64:
        raise ValueError(f"{name}: labels must be [M] = [{m}] int64, got shape {tuple(labels.shape)} of {labels.dtype}")
    if not ((labels >= 0) & (labels < num_classes)).all():
        raise ValueError(
            f"{name}: labels must be in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}"
        )


def _refuse_not_finite(state: dict[str, Tensor], step: int) -> None:
    name = first_not_finite(state)
    if name is not None:
        raise FloatingPointError(f"{name} is not finite at step {step} and was not saved: try a smaller learning rate")
