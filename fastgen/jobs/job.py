"""`Job`: what is drawn, in shards of consecutive seeds; a subclass says how a batch is drawn, and which settings decide it."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shard:
    """A part of a job that is drawn and written as one: its number, and its seeds."""

    index: int
    seeds: range


class Drawn(NamedTuple):
    """A shard as it is written: images [n, H, W, C] uint8 or rows [n, D] float32, their seeds [n] and labels [n] int64."""

    data: np.ndarray
    seeds: np.ndarray
    labels: np.ndarray | None


class Job(ABC):
    """``num`` examples of the seeds ``seed`` to ``seed + num - 1``, cut into shards.

    A shard is drawn in batches of ``batch_size`` from its first seed on. So what a batch is made of, and with it every bit of a
    shard, follows from the arguments here, the weights and the shard: not from who draws it, when, or beside whom.

    Args:
        num: of the examples.
        seed: of the first.
        labels: [num] classes in the order of the seeds; None without classes.
        shard_size: examples of a shard; the last one has what is left.
        batch_size: examples at a time.

    Raises:
        TypeError, ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self, num: int, *, seed: int = 0, labels: Tensor | None = None, shard_size: int = 64, batch_size: int = 64
    ) -> None:
        for name, value in (("num", num), ("shard_size", shard_size), ("batch_size", batch_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{type(self).__name__}: {name} must be an integer of at least 1, got {value!r}")
        if not -(2**63) <= seed <= 2**63 - num:
            raise ValueError(f"{type(self).__name__}: all seeds must be 64-bit integers, got seed={seed} and num={num}")
        if labels is not None and (labels.shape != (num,) or labels.dtype != torch.int64):
            raise ValueError(
                f"{type(self).__name__}: labels must be [num] = [{num}] int64, got {labels.dtype} of {tuple(labels.shape)}"
            )
        self.num, self.seed, self.labels = num, seed, labels
        self.shard_size, self.batch_size = shard_size, batch_size

    @abstractmethod
    def draw_batch(self, seeds: Sequence[int], labels: Tensor | None) -> Tensor:
        """Images [n, C, H, W] in [-1, 1] or rows [n, D], each of its seed, with the class in ``labels`` [n]."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of an example as ``draw_batch`` has it: (C, H, W) of images, (D,) of rows."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The model whose weights decide what is drawn."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the bytes beside the weights, ready for JSON; a subclass adds its own."""
        labels = None if self.labels is None else hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()
        return {
            "num": self.num,
            "seed": self.seed,
            "shard_size": self.shard_size,
            "batch_size": self.batch_size,
            "labels_sha256": labels,
        }

    def __len__(self) -> int:
        """The number of shards."""
        return -(-self.num // self.shard_size)

    def shard(self, index: int) -> Shard:
        """The shard number ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"{type(self).__name__}: shard must be in [0, {len(self)}), got {index}")
        first = index * self.shard_size
        return Shard(index, range(self.seed + first, self.seed + min(first + self.shard_size, self.num)))

    @torch.no_grad()
    def draw(self, shard: Shard) -> Drawn:
        """All examples of ``shard``.

        Raises:
            FloatingPointError: an example is not finite; the message names its seed.
        """
        first = shard.seeds.start - self.seed
        labels = None if self.labels is None else self.labels[first : first + len(shard.seeds)]
        parts = []
        for i in range(0, len(shard.seeds), self.batch_size):
            seeds = shard.seeds[i : i + self.batch_size]
            batch = self.draw_batch(seeds, None if labels is None else labels[i : i + self.batch_size]).cpu()
            broken = [seed for seed, example in zip(seeds, batch, strict=True) if not example.isfinite().all()]
            if broken:
                raise FloatingPointError(
                    f"{len(broken)} of {len(seeds)} examples are not finite, that of seed {broken[0]} the first"
                )
            parts.append(to_uint8(batch) if batch.dim() == 4 else batch.float().numpy())
        seeds_drawn = np.array(shard.seeds, dtype=np.int64)
        return Drawn(np.concatenate(parts), seeds_drawn, None if labels is None else labels.numpy())


def to_uint8(images: Tensor) -> np.ndarray:
    """[N, C, H, W] in [-1, 1] -> [N, H, W, C], rounded to the nearest of 256 levels; what is beyond -1 and 1 is clipped."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().numpy()


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state dict of ``model``, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")
    return digest.hexdigest()


def settings_of(job: Job) -> Mapping[str, Any]:
    """What the manifest of ``job`` says of it: its kind and settings."""
    return {"job": type(job).__name__, **job.settings}
