"""A model here and the same in a peer library, trained in turns on the same batches, either timed; and how they end."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .flow_peers import Pair, Side

EMA_DECAY = 0.98
SAMPLES = 256


@dataclass
class Run:
    """One library's part of a contest."""

    library: str
    held_out: list[float] = field(default_factory=list)  # one for each seed
    steps: list[float] = field(default_factory=list)  # seconds
    samples: list[float] = field(default_factory=list)  # seconds of SAMPLES

    @property
    def step(self) -> float:
        return statistics.median(self.steps)

    @property
    def sampling(self) -> float:
        return min(self.samples)


@dataclass(frozen=True)
class Contest:
    """A model on data, here and in a peer library, for a few seeds.

    Args:
        what: the model and the data.
        unit: of the scores: nats a row or bits a dimension, of data not trained on; the lower the better.
        ours, theirs: what became of them.
    """

    what: str
    unit: str
    ours: Run
    theirs: Run

    @property
    def difference(self) -> float:
        """Ours less theirs, the mean over seeds."""
        return statistics.mean(self.ours.held_out) - statistics.mean(self.theirs.held_out)

    @property
    def noise(self) -> float:
        """The deviation of the peer's scores over seeds."""
        return statistics.stdev(self.theirs.held_out)

    @property
    def equal(self) -> bool:
        """Within twice the noise; NaN is not."""
        return abs(self.difference) <= 2 * self.noise


@dataclass(frozen=True)
class Setting:
    """What both sides are trained on, and how.

    Args:
        what, unit: as in :class:`Contest`.
        make: a pair of equal models from the first examples, after ``torch.manual_seed``.
        train, held_out: [M, *], as the models take them.
        scored: nats [N] as the unit has them.
        steps, lr, batch_size: of Adam, whose rate falls to 0 along half a cosine.
    """

    what: str
    unit: str
    make: Callable[[Tensor], Pair]
    train: Tensor
    held_out: Tensor
    scored: Callable[[Tensor], Tensor]
    steps: int
    lr: float = 2e-3
    batch_size: int = 64


def contest(setting: Setting, seeds: Sequence[int], quiet: bool) -> Contest:
    """Train both for every seed, a step of each in turns."""
    runs: tuple[Run, Run] | None = None
    total = setting.steps * len(seeds)
    with tqdm(total=total, desc=setting.what, unit="step", disable=quiet or None, leave=False) as bar:
        for seed in seeds:
            torch.manual_seed(seed)
            pair = setting.make(setting.train[: 4 * setting.batch_size])
            runs = runs or (Run(pair[0].library), Run(pair[1].library))
            _train(setting, pair, runs, seed, bar)
    assert runs is not None
    return Contest(setting.what, setting.unit, *runs)


def _train(setting: Setting, pair: Pair, runs: tuple[Run, Run], seed: int, bar: tqdm) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizers = [torch.optim.Adam(side.model.parameters(), lr=setting.lr) for side in pair]
    averages = [[p.detach().clone() for p in side.model.parameters()] for side in pair]
    for step in range(setting.steps):
        batch = setting.train[torch.randint(len(setting.train), (setting.batch_size,), generator=generator)]
        rate = setting.lr * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / setting.steps)) / 2
        for k in (0, 1) if step % 2 else (1, 0):
            begin = time.perf_counter()
            _step(setting, pair[k], optimizers[k], rate, batch)
            runs[k].steps.append(time.perf_counter() - begin)
            with torch.no_grad():
                for average, p in zip(averages[k], pair[k].model.parameters(), strict=True):
                    average.lerp_(p, 1 - min(EMA_DECAY, (1 + step) / (10 + step)))
        bar.update()
    for k in (0, 1):
        _finish(setting, pair[k], runs[k], averages[k], seed)


def _step(setting: Setting, side: Side, optimizer: torch.optim.Optimizer, rate: float, batch: Tensor) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = setting.scored(side.log_prob(batch)).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(side.model.parameters(), 5.0)
    optimizer.step()


@torch.no_grad()
def _finish(setting: Setting, side: Side, run: Run, average: list[Tensor], seed: int) -> None:
    """The score of the moving average, and the time of samples from it."""
    for p, mean in zip(side.model.parameters(), average, strict=True):
        p.copy_(mean)
    side.model.eval()
    run.held_out.append(float(setting.scored(side.log_prob(setting.held_out)).double().mean()))
    for _ in range(2):
        torch.manual_seed(seed)
        begin = time.perf_counter()
        side.sample(SAMPLES)
        run.samples.append(time.perf_counter() - begin)
