"""Messages between two ranks."""

from __future__ import annotations

import pytest
import torch

from colrow.comm import point_to_point
from colrow.comm.group import ParallelGroup
from tests.layers.dense import raises
from tests.ranks import RankPool


def check_messages(tp: ParallelGroup) -> None:
    """Around the ring, later ones first issued; of any stride and dtype, also empty."""
    right, left = (tp.rank + 1) % tp.size, (tp.rank - 1) % tp.size
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        for shape in ((3, 4), (0, 2), ()):
            mine = torch.full(shape, tp.rank, dtype=dtype)
            mine = mine.t() if shape == (3, 4) else mine
            sending = point_to_point.send_async(mine, tp, right)
            buffer = torch.empty(mine.shape, dtype=dtype)
            assert point_to_point.recv(buffer, tp, left) is buffer
            sending.wait()
            assert torch.equal(buffer, torch.full(mine.shape, left, dtype=dtype))
    for peer in (tp.rank, -1, tp.size):
        with raises(ValueError, f"cannot send to rank {peer}", f"0 to {tp.size - 1}"):
            point_to_point.send(torch.ones(1), tp, peer)
        with raises(ValueError, f"cannot receive from rank {peer}"):
            point_to_point.recv(torch.ones(1), tp, peer)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_messages_go_round(ranks: RankPool, n: int) -> None:
    ranks(n, check_messages)
