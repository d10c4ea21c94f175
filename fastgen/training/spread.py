"""`Spread`: how the examples of a step are shared out.

It decides how sums are rounded and, where there is dropout, which masks are drawn; nothing else of a training.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from .._ranks import Ranks
from .collectives import alone


@dataclass(frozen=True)
class Spread:
    """Over ranks, and at each over so many passes of the network.

    Args:
        ranks: the processes that learn together, each from a part of every batch, as :func:`fastgen.training.meet` finds them;
            of several, :func:`fastgen.training.process_group` must be entered. By default this one.
        accumulate: micro-batches a step and rank, one after the other: less memory, and the gradient of the whole.
        fsdp: each of several ranks keeps a share of the weights, their moments and their average, in place of all of it
            (FSDP2): for models that are large beside the memory of a device.

    Example, under torchrun::

        ranks = meet()
        with process_group(ranks, device):
            trainer = Trainer(model, options, images, labels, device=device, spread=Spread(ranks, accumulate=2))
            trainer.fit(1000, [CheckpointEvery("checkpoint.safetensors", 100)])

    Raises:
        TypeError: ``accumulate`` is no integer, or ``fsdp`` is not True or False.
        ValueError: ``accumulate`` is less than 1.
    """

    ranks: Ranks = field(default_factory=alone)
    accumulate: int = 1
    fsdp: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.accumulate, int) or isinstance(self.accumulate, bool):
            raise TypeError(f"accumulate must be an integer, got {self.accumulate!r}")
        if not isinstance(self.fsdp, bool):
            raise TypeError(f"fsdp must be True or False, got {self.fsdp!r}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")

    @property
    def sharded(self) -> bool:
        """Whether the ranks keep shares; one keeps all there is."""
        return self.fsdp and self.ranks.world_size > 1

    def check(self, batch_size: int) -> None:
        """Raise ValueError where a batch has too few examples for every micro-batch to have one."""
        needed = self.ranks.world_size * self.accumulate
        if batch_size < needed:
            raise ValueError(
                f"batch_size must be at least the number of ranks times accumulate, "
                f"{self.ranks.world_size} x {self.accumulate} = {needed}, got {batch_size}"
            )

    def own(self, n: int) -> slice:
        """This rank's part of a batch of ``n``."""
        return _part(0, n, self.ranks.rank, self.ranks.world_size)

    def micro_batches(self, n: int) -> Iterator[slice]:
        """The parts of this rank's part, one after the other."""
        own = self.own(n)
        for i in range(self.accumulate):
            yield _part(own.start, own.stop, i, self.accumulate)


def _part(first: int, last: int, i: int, of: int) -> slice:
    """The ``i``-th of so many parts of [first, last), whose sizes differ by one at most."""
    n = last - first
    return slice(first + i * n // of, first + (i + 1) * n // of)
