"""Workers survive what a task does to them, and a failure names its rank."""

from __future__ import annotations

import os
import time

import pytest
import torch.distributed as dist

from benchmarks.zoo.pool import TaskFailure, Workers


def add(number: int) -> tuple[int, int]:
    total = [dist.get_rank() + number]
    gathered: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, total)
    return os.getpid(), sum(each[0] for each in gathered)


def harm(how: str) -> None:
    if how == "all":
        raise ValueError("said by all")
    if dist.get_rank() == 1:
        if how == "die":
            os._exit(3)
        if how == "raise":
            raise ValueError("said by one")
        time.sleep(60)
    dist.barrier()


@pytest.mark.slow
def test_a_broken_task_does_not_break_the_next() -> None:
    with Workers(2) as workers:
        pid, total = workers.run(add, 5, timeout_seconds=60)
        assert total == 11
        with pytest.raises(TaskFailure, match="ValueError: said by all") as caught:
            workers.run(harm, "all", timeout_seconds=60)
        assert caught.value.raised is not None and caught.value.raised.type_name == "ValueError"
        assert workers.run(add, 5, timeout_seconds=60)[0] == pid  # nobody was replaced
        for how, message in (
            ("raise", "rank 1 failed alone|said by one"),
            ("die", "rank 1 died"),
            ("hang", "not done after 1 s"),
        ):
            with pytest.raises(TaskFailure, match=message):
                workers.run(harm, how, timeout_seconds=1 if how == "hang" else 1000)
            fresh, total = workers.run(add, 1, timeout_seconds=60)
            assert total == 3 and fresh != pid
            pid = fresh
