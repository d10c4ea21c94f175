"""What ranks tell each other: reports, statistics, features. Who is ready first changes nothing; one process has nobody to tell."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .._ranks import RankError, Ranks
from .statistics import Moments

Report = TypeVar("Report")


@contextlib.contextmanager
def agreed(ranks: Ranks) -> Iterator[None]:
    """What every rank does for itself inside: none goes on where one has failed, and none is left waiting.

    Raises:
        RankError: one or more ranks failed inside, or each in its own way: at every rank. Where all failed alike each keeps its own
            error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as own:
        if ranks.world_size == 1:
            raise
        error = own
    said = tell_all(None if error is None else _in_words(error), ranks)
    failed = {rank: text for rank, text in enumerate(said) if text is not None}
    if error is not None and len(failed) == ranks.world_size and len(set(said)) == 1:
        raise error
    if failed:
        rank = min(failed)
        more = f" ({len(failed)} of {ranks.world_size} ranks failed)" if len(failed) > 1 else ""
        raise RankError(f"rank {rank}: {failed[rank]}{more}") from error


def tell_all(report: Report, ranks: Ranks) -> list[Report]:
    """The reports of all ranks, in the order of their numbers, on each of them."""
    if ranks.world_size == 1:
        return [report]
    reports: list[Report] = [report] * ranks.world_size
    dist.all_gather_object(reports, report)
    return reports


def _in_words(error: Exception) -> str:
    """What it says; of a defect, which may say little, its type before that."""
    foreseen = isinstance(error, OSError | ValueError | FloatingPointError) and str(error)
    return str(error) if foreseen else f"{type(error).__name__}: {error}"


def merge_moments(moments: Moments, ranks: Ranks, device: torch.device) -> Moments:
    """On rank 0 the moments of all ranks' rows, merged in pairs, then pairs of pairs; on the others a part of them.

    Args:
        moments: of this rank, of as many features as those of the others.
        ranks: this rank among the others, in a process group.
        device: of the tensors that the process group takes.
    """
    dim, reach = len(moments.mean), 1
    while reach < ranks.world_size:
        if ranks.rank % (2 * reach):
            count = moments.mean.new_tensor([moments.count])
            packed = torch.cat([count, moments.mean, moments.m2.flatten()])
            dist.send(packed.to(device), ranks.rank - reach)
            return moments
        if ranks.rank + reach < ranks.world_size:
            received = torch.empty(1 + dim + dim * dim, dtype=torch.float64, device=device)
            dist.recv(received, ranks.rank + reach)
            received = received.to(moments.mean.device)
            other = Moments(dim, moments.mean.device)
            other.count = int(received[0])
            other.mean, other.m2 = received[1 : 1 + dim], received[1 + dim :].view(dim, dim)
            moments.merge(other)
        reach *= 2
    return moments


def gather_rows(rows: Tensor, counts: Sequence[int], ranks: Ranks, device: torch.device) -> Tensor | None:
    """On rank 0 the rows of all ranks one after the other, on the others None.

    Args:
        rows: [n, D] of this rank, on the CPU.
        counts: of the rows of each rank.
        ranks: this rank among the others, in a process group.
        device: of the tensors that the process group takes.
    """
    if not ranks.first:
        if len(rows):
            dist.send(rows.contiguous().to(device), 0)
        return None
    gathered = torch.empty(sum(counts), rows.shape[1], dtype=rows.dtype)
    start = counts[0]
    gathered[:start] = rows
    for rank, count in enumerate(counts[1:], start=1):
        if count:
            received = torch.empty(count, rows.shape[1], dtype=rows.dtype, device=device)
            dist.recv(received, rank)
            gathered[start : start + count] = received.cpu()
        start += count
    return gathered
