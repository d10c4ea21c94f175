"""Callbacks: when they are called, what the two of the package do, and how a run is stopped."""

import math

import pytest

from fastgen.training import Callback, CheckpointEvery, ProgressBar

from .tiny import make_trainer


class Recorder(Callback):
    def __init__(self, at=None, action=None):
        self.seen, self.at, self.action = [], at, action

    def on_start(self, trainer, last_step):
        self.seen.append(("start", trainer.step, last_step))

    def on_step(self, trainer, loss):
        assert math.isfinite(loss)
        self.seen.append(("step", trainer.step))
        if trainer.step == self.at:
            self.action(trainer)

    def on_end(self, trainer, failed):
        self.seen.append(("end", trainer.step, failed))


def test_the_order_of_calls():
    recorder, trainer = Recorder(), make_trainer()
    trainer.fit(2, [recorder])
    trainer.fit(3, [recorder])
    assert recorder.seen == [
        ("start", 0, 2), ("step", 1), ("step", 2), ("end", 2, False), ("start", 2, 3), ("step", 3), ("end", 3, False)
    ]  # fmt: skip


def test_stop_ends_the_run_after_the_step_and_the_next_run_goes_on():
    trainer = make_trainer()
    recorder = Recorder(2, lambda trainer: trainer.stop())
    trainer.fit(5, [recorder])
    assert trainer.step == 2 and recorder.seen[-1] == ("end", 2, False)
    trainer.fit(5)
    assert trainer.step == 5


def test_a_failure_is_told_and_goes_on_up():
    def fail(trainer):
        raise ZeroDivisionError

    recorder = Recorder(1, fail)
    with pytest.raises(ZeroDivisionError):
        make_trainer().fit(5, [recorder])
    assert recorder.seen[-1] == ("end", 1, True)


def test_checkpoints_every_so_often_and_at_the_end_but_not_of_a_failed_run(tmp_path, monkeypatch):
    trainer, saved = make_trainer(), []
    monkeypatch.setattr(trainer, "save", lambda path: saved.append((trainer.step, path)))
    trainer.fit(5, [CheckpointEvery(tmp_path, 2)])
    assert saved == [(2, tmp_path), (4, tmp_path), (5, tmp_path)]
    saved.clear()
    trainer.fit(6, [CheckpointEvery(tmp_path, 2)])
    assert [step for step, _ in saved] == [6]
    saved.clear()

    def fail(trainer):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer.fit(9, [CheckpointEvery(tmp_path, 5), Recorder(7, fail)])
    assert saved == []
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        CheckpointEvery(tmp_path, 0)


def test_the_bar_is_silent_where_there_is_no_terminal_and_keeps_the_loss(capsys):
    bar = ProgressBar()
    trainer = make_trainer()
    trainer.fit(1, [bar])
    first = bar.loss
    trainer.fit(2, [bar, recorder := Recorder()])
    assert first > 0 and bar.loss != first and abs(bar.loss - first) < 0.02 * 10 * first and recorder.seen
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""
