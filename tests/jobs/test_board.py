"""What ranks hear of each other: signs of life, which a rank that has gone with its machine no longer gives."""

import threading
import time

import pytest
import torch.distributed as dist

from fastgen._ranks import Ranks
from fastgen.jobs import JobError, board
from fastgen.jobs.board import Board, Part


@pytest.fixture
def boards(monkeypatch):
    """Those of three ranks that are impatient."""
    monkeypatch.setattr(board, "BEAT", 0.02)
    monkeypatch.setattr(board, "SILENCE", 2.0)
    store = dist.HashStore()
    return [Board(Ranks(rank, 3, rank, store, launched=True)) for rank in range(3)]


def test_a_rank_that_has_gone_is_missed_and_one_that_has_left_is_not(boards):
    first, left, gone = boards
    with gone.alive():
        pass
    left.leave(Part(shards=4))
    with pytest.raises(JobError, match="rank 2 has given no sign of life for 2 seconds"):
        first.await_others()


def test_a_rank_that_takes_its_time_is_waited_for(boards):
    first, quick, slow = boards
    quick.leave(Part(shards=4))

    def draw():
        with slow.alive():
            time.sleep(5)
        slow.leave(Part(shards=1))

    thread = threading.Thread(target=draw)
    thread.start()
    assert [part.shards for part in first.await_others()] == [4, 1]
    thread.join()
