import pytest
import torch
from torch import Tensor

from ssd.errors import UserError
from ssd.queue import Queue


def numbered(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None]


def test_the_oldest_goes_out_and_the_place_wraps():
    queue = Queue(5, 1)
    assert not queue.valid.any()
    queue.update(numbered(1, 3))
    assert queue.valid.tolist() == [True] * 3 + [False] * 2
    queue.update(numbered(4, 3))
    assert queue.vectors[:, 0].tolist() == [6, 2, 3, 4, 5] and queue.valid.all() and int(queue.place) == 1
    queue.update(numbered(7, 5))
    assert queue.vectors[:, 0].tolist() == [11, 7, 8, 9, 10]
    again = Queue(5, 1)
    again.load_state_dict(queue.state_dict())
    again.update(numbered(12, 1))
    assert again.vectors[:, 0].tolist() == [11, 12, 8, 9, 10]


def of_rank(rank: int, world: int) -> Tensor:
    queue = Queue(6, 1)
    queue.update(numbered(10 * rank, 2))
    return queue.vectors


def test_processes_fill_one_queue_in_their_order(pair):
    for vectors in pair.run(of_rank):
        assert vectors[:, 0].tolist() == [0, 1, 10, 11, 0, 0]


def test_more_than_it_holds_is_refused():
    with pytest.raises(UserError, match="queue_size: 2 is less than the 3 samples"):
        Queue(2, 1).update(numbered(0, 3))
    with pytest.raises(UserError, match="queue_size: 0"):
        Queue(0, 1)
