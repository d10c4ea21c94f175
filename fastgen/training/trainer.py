"""`Trainer`: denoising diffusion training of a `UNet`, one step at a time, with EMA and an exact checkpoint.

Ho et al. 2020, algorithm 1 (epsilon prediction); Ho and Salimans 2022 (the class dropped at random, for guidance).
"""

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import CheckpointError, UNet, load_state, save_state
from ..models.checkpoint import json_metadata
from ..samplers import linear_betas, squared_cosine_betas

SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": linear_betas, "squared_cosine": squared_cosine_betas}
PREDICTION_TYPE = "epsilon"

_ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingOptions:
    """What decides the course of a training run; a checkpoint is resumed only under equal options."""

    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 200
    seed: int = 0
    schedule: str = "squared_cosine"
    timesteps: int = 1000
    ema_decay: float = 0.999
    label_dropout: float = 0.1

    def as_dict(self) -> dict[str, Any]:
        """The options and what samplers need to know, for JSON."""
        return {**asdict(self), "prediction_type": PREDICTION_TYPE}


class Trainer:
    """A model in training.

    Args:
        config: of the :class:`fastgen.models.UNet`; class-conditional with a null class.
        options: see :class:`TrainingOptions`.
        images: [M, C, H, W] in [-1, 1].
        labels: [M] int64.

    Raises:
        ValueError: the model of ``config`` has no null class.

    Everything random comes from two generators whose states are part of the checkpoint: the trainer's own (batches,
    timesteps, noise, dropped labels) and torch's global one (initial weights, dropout), which the trainer seeds.
    """

    def __init__(self, config: Mapping[str, Any], options: TrainingOptions, images: Tensor, labels: Tensor) -> None:
        self.options = options
        self.images = images
        self.labels = labels
        self.generator = torch.Generator().manual_seed(options.seed)
        torch.manual_seed(options.seed)
        self.model = UNet.from_config(config).train()
        if self.model.null_label is None:
            raise ValueError(f"Trainer: config must have num_classes and null_class, got {dict(config)}")
        self._null_label = self.model.null_label
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr)
        self.step = 0
        alpha_bar = torch.cumprod(1 - SCHEDULES[options.schedule](options.timesteps).double(), dim=0)
        self._signal = alpha_bar.sqrt().float()
        self._noise = (1 - alpha_bar).sqrt().float()

    def train_step(self) -> float:
        """One optimiser step; returns the loss."""
        loss = F.mse_loss(*self._predict())
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * min(1.0, (self.step + 1) / max(1, self.options.warmup))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self._update_ema()
        return loss.item()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that :meth:`restore` needs to one safetensors file, atomically."""
        metadata = {
            "step": str(self.step),
            "options": json.dumps(asdict(self.options)),
            "config": json.dumps(self.model.config),
        }
        save_state(path, dict(self._state()), metadata)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Continue from what :meth:`save` wrote, as if the run had never stopped.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is damaged, is no training checkpoint, or is of a run with other options.
        """
        state, metadata = load_state(path)
        _check_equal(path, json_metadata(path, metadata, "options"), asdict(self.options))
        _check_equal(path, json_metadata(path, metadata, "config"), self.model.config)
        self.step = int(metadata["step"])
        for (
            parameter
        ) in self.model.parameters():  # Adam makes its moments at the first step; here they come from the file
            moments = {name: torch.zeros_like(parameter) for name in _ADAM_MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}
        expected = dict(self._state())
        if state.keys() != expected.keys():
            odd = sorted(state.keys() ^ expected.keys())
            raise CheckpointError(f"{path}: not a training checkpoint of this model; it differs in {odd[:5]}")
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(state[name])
        self.generator.set_state(state["random.trainer"])
        torch.set_rng_state(state["random.global"])

    def _predict(self) -> tuple[Tensor, Tensor]:
        """The prediction of the noise in a random batch, and the noise."""
        options, generator = self.options, self.generator
        n = options.batch_size
        chosen = torch.randint(len(self.images), (n,), generator=generator)
        images, labels = self.images[chosen], self.labels[chosen]
        timesteps = torch.randint(options.timesteps, (n,), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        dropped = torch.rand(n, generator=generator) < options.label_dropout
        labels = torch.where(dropped, self._null_label, labels)
        signal, sigma = self._signal[timesteps], self._noise[timesteps]
        noisy = signal[:, None, None, None] * images + sigma[:, None, None, None] * noise
        return self.model(noisy, timesteps, labels), noise

    @torch.no_grad()
    def _update_ema(self) -> None:
        # early on the average follows faster: the initial weights are worth nothing
        decay = min(self.options.ema_decay, (1 + self.step) / (10 + self.step))
        for average, parameter in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            average.lerp_(parameter, 1 - decay)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.state_dict().items():
            yield f"model.{name}", tensor
        for name, tensor in self.ema.state_dict().items():
            yield f"ema.{name}", tensor
        for name, parameter in self.model.named_parameters():
            for moment in _ADAM_MOMENTS:
                yield f"adam.{moment}.{name}", self.optimizer.state[parameter][moment]
        yield "random.trainer", self.generator.get_state()
        yield "random.global", torch.get_rng_state()


def _check_equal(path: str | os.PathLike[str], saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{path}: the checkpoint was made with {name}={saved.get(name)!r}, this run has {wanted.get(name)!r}"
            )
