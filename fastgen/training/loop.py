"""`TrainingLoop`: what is the same whatever is learned and on however many ranks: steps, moving average, an exact checkpoint."""

import contextlib
import copy
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from hashlib import blake2b
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import __version__
from ..models import AutoregressiveModel, FlowModel, UNet, load_state, save_state
from ..models.checkpoint import first_not_finite, json_metadata
from ..ops._packed_weights import WEIGHTS
from .callbacks import Callback
from .collectives import copy_from_first, done_by_first, from_first, summed
from .ema import EMA
from .objective import Objective, gradients_later, replicated
from .options import OptimizerOptions
from .restoring import check_equal, check_random_states, check_tensors, read_step
from .spread import Spread

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MAX_SEED = 2**63 - 1

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
        spread: over ranks and micro-batches, see :class:`Spread`; one process and one pass a step where None.

    Attributes:
        step: how many steps have been done.
        ema: the moving average of the model, :class:`EMA`; of several ranks that keep shares, this one's.

    Everything random comes from two generators whose states are part of the checkpoint: the trainer's own, which draws a few
    numbers for each example of a batch on the CPU and is seeded by the options, and torch's global one on ``device`` (dropout).
    Initial weights are the model's own affair: call ``torch.manual_seed`` before it is built.

    Every rank draws the numbers of the whole batch and makes its own part of the examples of them, so that what a step learns from
    depends on its number alone, and so does the checkpoint. Ranks begin with the weights of rank 0. Where there are several, the
    global generator is seeded anew at each step, from the seed, the step and the rank: dropout differs with the number of ranks,
    and nothing else but rounding does. What is said of all ranks (:meth:`fit`, :meth:`save`, :meth:`save_weights`,
    :meth:`restore`, :meth:`average`) is called by all of them.

    Raises:
        ValueError: a batch has fewer examples than there are ranks and micro-batches, or several ranks have no process group.
    """

    def __init__(
        self,
        model: Model,
        options: Options,
        images: Tensor,
        labels: Tensor | None,
        device: torch.device | str,
        spread: Spread | None = None,
    ) -> None:
        self.options = options
        self.spread = Spread() if spread is None else spread
        self.ranks = self.spread.ranks
        self.spread.check(options.batch_size)
        if self.ranks.world_size > 1 and not dist.is_initialized():
            raise ValueError(
                f"spread is over {self.ranks.world_size} ranks, which need a process group: enter fastgen.training.process_group"
            )
        self.device = torch.device(device)
        self.images = images.to(self.device)
        self.labels = None if labels is None else labels.to(self.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.model: Model = model.train()
        if not self.spread.sharded:  # which moves the model layer by layer, and wants its weights contiguous
            self.model.to(self.device)
            # channels-last convolutions take up to a fifth less time, forward and backward, on CPUs too
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        copy_from_first(self.ranks, [*model.parameters(), *model.buffers()], self.device)
        self.ema: EMA[Model] = EMA(self.model, options.ema_decay)
        self._objective: nn.Module = Objective(self.model, lambda batch: self.loss(batch))
        if self.spread.sharded:
            from . import sharding  # half a second of imports that others have no use for

            sharding.shard(self._objective, self.model, self.ema.model, self.ranks.world_size, self.device)
        # DTensors are none of those that torch takes in one pass by itself
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr, foreach=self.spread.sharded or None)
        for parameter in self.model.parameters():  # Adam's own beginning, made here so that step 0 can be saved
            moments = {name: torch.zeros_like(parameter) for name in ADAM_MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        self.step = 0
        self._wish = False  # of this rank, to stop
        self._stopping = False  # all of them

    def draw(self) -> tuple[Tensor, ...]:
        """The numbers that the examples of the next batch follow from, each [batch_size], by the trainer's generator."""
        raise NotImplementedError

    def examples(self, numbers: tuple[Tensor, ...]) -> Any:
        """The batch that some of the numbers of :meth:`draw`, [N] each, make, on the trainer's device."""
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        """The loss of the model on ``batch``, a scalar: a mean over its examples."""
        raise NotImplementedError

    def draw_batch(self) -> Any:
        """This rank's part of the next batch of the trainer's generator."""
        own = self.spread.own(self.options.batch_size)
        return self.examples(tuple(x[own] for x in self.draw()))

    def after_backward(self) -> None:
        """What is done to the gradients before the optimiser has them: nothing."""

    def fit(self, last_step: int, callbacks: Iterable[Callback] = ()) -> None:
        """Train until :attr:`step` is ``last_step``, or until :meth:`stop`.

        Raises:
            FloatingPointError: the loss is not finite; the weights are those before that step.
        """
        callbacks = list(callbacks)
        self._wish = self._stopping = False
        failed = True
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
        """End :meth:`fit` after the step it is in: for a callback or a signal handler.

        Of several ranks one is enough. They hear of it with the losses, so a callback's wish ends it after the step that follows.
        """
        self._wish = True
        if self.ranks.world_size == 1:
            self._stopping = True

    def train_step(self) -> float:
        """One optimiser step; returns the loss, the mean over the batch of all ranks."""
        self.optimizer.zero_grad(set_to_none=True)
        value, wishes = summed(self.ranks, (self._accumulate_gradients(), float(self._wish)), self.device)
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {self.step}: try a smaller learning rate")
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate(self.step)
        self.after_backward()
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.model, self.step)
        if self.spread.sharded:
            # gathered weights are written where the last ones were, and no version counter tells
            WEIGHTS.clear()
        if self.ranks.world_size > 1:
            self._stopping = wishes > 0
        return value

    def _accumulate_gradients(self) -> float:
        """Gradients of the mean over the whole batch; returns this rank's share of that mean."""
        numbers, n = self.draw(), self.options.batch_size
        if self.ranks.world_size > 1 and not self.spread.sharded and isinstance(self._objective, Objective):
            self._objective = replicated(self._objective, self.examples(tuple(x[:1] for x in numbers)))
        if self.ranks.world_size > 1:
            torch.manual_seed(_step_seed(self.options.seed, self.step, self.ranks.rank))
        value, parts = 0.0, list(self.spread.micro_batches(n))
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else gradients_later(self._objective):
                loss = self._objective(self.examples(tuple(x[part] for x in numbers)))
                share = (part.stop - part.start) / n
                # the gradients of the ranks are averaged, and those of parts of unequal size must count by their size
                (loss * (share * self.ranks.world_size)).backward()
            value = value + loss.detach().double() * share
        return float(value)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that :meth:`restore` needs to one safetensors file, atomically; of several ranks rank 0 does.

        Raises:
            FloatingPointError: a weight or moment is not finite; nothing is written.
            OSError: the file cannot be written; what was there before is untouched.
            RankError: at the other ranks, of either.
        """
        state = {}
        for name, tensor in self._state():
            whole = self._whole(tensor)
            if self.ranks.first:  # the others have no use for it
                state[name] = whole
        metadata = {
            "step": str(self.step),
            "options": json.dumps(asdict(self.options)),
            "config": json.dumps(self.model.config),
        }
        with done_by_first(self.ranks) as first:
            if first:
                _refuse_not_finite(state, self.step)
                save_state(path, state, metadata)

    def average(self, dtype: torch.dtype | None = None) -> Model | None:
        """A copy of the moving average, whole, for rank 0; None for the others.

        Args:
            dtype: of the copy; that of the model where None.
        """
        memo: dict[int, Any] = {}
        for parameter in self.ema.model.parameters():
            whole = self._whole(parameter.detach())
            if self.ranks.first:
                whole = whole.clone() if dtype is None else whole.to(dtype, copy=True)
                memo[id(parameter)] = nn.Parameter(whole, requires_grad=False)
        return copy.deepcopy(self.ema.model, memo).to(dtype) if self.ranks.first else None

    def save_weights(
        self,
        path: str | os.PathLike[str],
        recipe: str | None = None,
        dtype: torch.dtype | None = None,
        more: Mapping[str, Any] | Callable[[Model], Mapping[str, Any]] | None = None,
    ) -> dict[str, Any] | None:
        """Write the moving average as the model's own ``save`` does, with what samplers need to know of the training.

        Args:
            path: the file.
            recipe: the name of data, model and options together, for the record.
            dtype: of the weights in the file; that of the model where None.
            more: to go with the record, ready for JSON; or what finds it out of the weights in the file, in the dtype of the model.

        Returns:
            The record; None at ranks other than rank 0, which writes.

        Raises: as :meth:`save`.
        """
        average, record = self.average(dtype), None
        with done_by_first(self.ranks):
            if average is not None:
                _refuse_not_finite(average.state_dict(), self.step)
                if callable(more):
                    more = more(copy.deepcopy(average).to(self.device, next(self.ema.model.parameters()).dtype))
                shape = {"image_shape": list(self.images.shape[1:])} if self.images.dim() == 4 else {}
                made = {**shape, "steps": self.step, "version": __version__}
                named = {} if recipe is None else {"recipe": recipe}
                record = {**asdict(self.options), **named, **made, **(more or {})}
                average.save(path, {"training": json.dumps(record)})
        return record

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Continue from what :meth:`save` wrote, on however many ranks, as if the run had never stopped; rank 0 reads it for all.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is damaged, is no training checkpoint, or is of a run with other options; the message names
                file and field, and the trainer is as it was.
            RankError: at the other ranks, of either.
        """
        own, state, step = dict(self._state()), dict[str, Tensor](), 0
        with done_by_first(self.ranks) as first:
            if first:
                state, metadata = load_state(path)
                check_equal(path, "options", json_metadata(path, metadata, "options"), asdict(self.options))
                check_equal(path, "config", json_metadata(path, metadata, "config"), self.model.config)
                step = read_step(path, metadata)
                check_tensors(path, state, own)
                check_random_states(path, {name: state[name] for name in own if name.startswith("random.")})
        # nothing below can fail
        self.step = int(from_first(self.ranks, torch.tensor(step), self.device))
        with torch.no_grad():
            for name, tensor in own.items():
                value = state.pop(name) if first else torch.empty(tensor.shape, dtype=tensor.dtype)
                self._put(tensor, from_first(self.ranks, value, self.device))
        self.generator.set_state(own["random.trainer"])
        torch.set_rng_state(own["random.global"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own["random.cuda"], self.device)
        for parameter in self.model.parameters():
            self.optimizer.state[parameter]["step"].fill_(self.step)

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

    def _whole(self, tensor: Tensor) -> Tensor:
        """``tensor``, or the whole of which it is this rank's share."""
        if not self.spread.sharded:
            return tensor
        from . import sharding

        return sharding.whole(tensor)

    def _put(self, tensor: Tensor, value: Tensor) -> None:
        """Copy ``value`` into ``tensor``, or this rank's share of it."""
        if not self.spread.sharded:
            tensor.copy_(value)
            return
        from . import sharding

        sharding.put(tensor, value)


def check_labels(name: str, labels: Tensor, m: int, num_classes: int) -> None:
    """Raise ValueError where ``labels`` are not [M] classes."""
    if labels.shape != (m,) or labels.dtype != torch.int64:
        raise ValueError(f"{name}: labels must be [M] = [{m}] int64, got shape {tuple(labels.shape)} of {labels.dtype}")
    if not ((labels >= 0) & (labels < num_classes)).all():
        raise ValueError(
            f"{name}: labels must be in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}"
        )


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Of dropout, below 2^63."""
    digest = blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _refuse_not_finite(state: dict[str, Tensor], step: int) -> None:
    name = first_not_finite(state)
    if name is not None:
        raise FloatingPointError(f"{name} is not finite at step {step} and was not saved: try a smaller learning rate")
