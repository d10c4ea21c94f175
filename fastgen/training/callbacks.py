"""What happens around the steps of `TrainingLoop.fit`: a progress bar, checkpoints, and whatever a user adds."""

import math
import os
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from .loop import TrainingLoop


class Callback:
    """Base of the callbacks; each method may be left as it is."""

    def on_start(self, trainer: "TrainingLoop[Any, Any]", last_step: int) -> None:
        """Before the first step of a run up to ``last_step``."""

    def on_step(self, trainer: "TrainingLoop[Any, Any]", loss: float) -> None:
        """After a step, the number ``trainer.step``."""

    def on_end(self, trainer: "TrainingLoop[Any, Any]", failed: bool) -> None:
        """After the last step, also of a run that was stopped. ``failed``: an exception ended it, maybe in the middle of a step."""


class ProgressBar(Callback):
    """A bar on the terminal, none where the output is no terminal; of several ranks, that of rank 0.

    Args:
        quiet: no bar there either.

    Attributes:
        loss: running mean of the loss, NaN before the first step.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.loss = math.nan
        self._bar: tqdm | None = None

    def on_start(self, trainer: "TrainingLoop[Any, Any]", last_step: int) -> None:
        quiet = self.quiet or not trainer.ranks.first
        self._bar = tqdm(initial=trainer.step, total=last_step, disable=quiet or None, unit="step")

    def on_step(self, trainer: "TrainingLoop[Any, Any]", loss: float) -> None:
        self.loss = loss if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * loss
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)

    def on_end(self, trainer: "TrainingLoop[Any, Any]", failed: bool) -> None:
        if self._bar is not None:
            self._bar.close()


class CheckpointEvery(Callback):
    """Saves the trainer to ``path`` every ``steps`` steps, and after the last one; of several ranks each has this callback."""

    def __init__(self, path: str | os.PathLike[str], steps: int) -> None:
        if steps < 1:
            raise ValueError(f"CheckpointEvery: steps must be at least 1, got {steps}")
        self.path = path
        self.steps = steps
        self._saved: int | None = None

    def on_step(self, trainer: "TrainingLoop[Any, Any]", loss: float) -> None:
        if trainer.step % self.steps == 0:
            self._save(trainer)

    def on_end(self, trainer: "TrainingLoop[Any, Any]", failed: bool) -> None:
        if not failed and self._saved != trainer.step:
            self._save(trainer)

    def _save(self, trainer: "TrainingLoop[Any, Any]") -> None:
        trainer.save(self.path)
        self._saved = trainer.step
