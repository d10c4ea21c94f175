"""`fastgen train` on several ranks: what is around the training, and what is said once of what all of them run into."""

import argparse
import contextlib
import re
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from ..._ranks import RankError, Ranks, process_group
from ...training import Spread


@contextlib.contextmanager
def together(args: argparse.Namespace, ranks: Ranks) -> Iterator[Spread]:
    """Around the training: the collectives of the ranks, and how a batch is shared out."""
    with warnings.catch_warnings(), process_group(ranks, args.device):
        # a copy of a gradient, and a caution of FSDP2 against what no model here does
        for message in ("Grad strides do not match bucket view strides", "FSDP2-wrapped module .* returned a view"):
            warnings.filterwarnings("ignore", message)
        yield Spread(ranks, args.accumulate, args.fsdp)


def with_one_voice(ranks: Ranks, train: Callable[[], int]) -> int:
    """The exit status of ``train``; of what all ranks run into, ranks other than the first say nothing."""
    try:
        return train()
    except FloatingPointError as error:  # the loss is that of all
        if ranks.first:
            raise
        raise RankError(str(error)) from error
    except RuntimeError as error:
        if ranks.world_size == 1 or isinstance(error, RankError) or not _is_lost(error):
            raise
        # gloo begins with a line of its source, and ends with advice
        said = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", str(error).splitlines()[0]).split(". ")[0]
        if ranks.first:
            raise ConnectionError(f"another rank has gone: {said}") from error
        raise RankError(said) from error


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed, as it does where another rank has died; gloo's errors have no class of their own."""
    return not isinstance(error, torch.OutOfMemoryError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
