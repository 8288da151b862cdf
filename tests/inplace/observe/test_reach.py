"""Which features reach which."""

import torch

from colrow.inplace.observe.reach import patterns


def test_patterns_of_vectors_and_of_what_reaches_nothing() -> None:
    x, scale, apart = (torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (4, 2, 3))
    rows = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    target = (x + rows[0] * 2).unflatten(-1, (2, 2)) * scale[:, None]
    found = patterns([target.flatten()], [rows, x, scale, apart], vectors=1)
    assert found[0] == {1: [1, 2, 4, 8], -1: [1, 2, 4, 8]}
    assert found[1] == {0: [1, 2, 4, 8], -1: [1, 2, 4, 8]}
    assert found[2] == {0: [0b11, 0b1100], -1: [0b11, 0b1100]}
    assert found[3] == {0: [0, 0, 0], -1: [0, 0, 0]}
    (whole,) = patterns([target.flatten()], [rows])
    assert whole[0] == [0b1111, 0, 0] and whole[1] == found[0][1]
