"""What the ranks of a training say to each other beside gradients; of one rank alone every function here does nothing.

All of them are called by all ranks, in the same order.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .._ranks import RankError, Ranks


def alone() -> Ranks:
    """One process, whatever has started it."""
    return Ranks(0, 1, 0, dist.HashStore(), launched=False)


def summed(ranks: Ranks, values: Sequence[float], device: torch.device) -> list[float]:
    """The sums of ``values`` over the ranks, in float64."""
    if ranks.world_size == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def largest(ranks: Ranks, value: int, device: torch.device) -> int:
    """The largest ``value`` of all ranks."""
    if ranks.world_size == 1:
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def from_first(ranks: Ranks, tensor: Tensor, device: torch.device) -> Tensor:
    """The ``tensor`` of rank 0, of which the others know shape and dtype; by way of ``device``, where it is then."""
    if ranks.world_size == 1:
        return tensor
    tensor = tensor.detach().to(device).contiguous()
    dist.broadcast(tensor, 0)
    return tensor


@torch.no_grad()
def copy_from_first(ranks: Ranks, tensors: Iterable[Tensor], device: torch.device) -> None:
    """Make each of ``tensors`` that of rank 0; one at a time is on ``device``, which carries it."""
    if ranks.world_size > 1:
        for tensor in tensors:
            tensor.copy_(from_first(ranks, tensor, device))


@contextlib.contextmanager
def done_by_first(ranks: Ranks) -> Iterator[bool]:
    """What rank 0 does for all, the others waiting until it is done: ``with done_by_first(ranks) as first: if first: ...``.

    Raises:
        RankError: at the other ranks, where it failed at rank 0, whose exception goes on up there.
    """
    if ranks.world_size == 1:
        yield True
        return
    failed: list[str | None] = [None]
    try:
        yield ranks.first
    except Exception as error:
        failed = [str(error)]
        raise
    finally:
        dist.broadcast_object_list(failed, 0)
    if failed[0] is not None:
        raise RankError(f"rank 0: {failed[0]}")
