"""The examples of models that are split in place show what they say."""

from __future__ import annotations

import re

import pytest

from tests.test_examples import run


@pytest.mark.slow
def test_a_module_of_ones_own_trains_as_the_whole_one() -> None:
    output = run("parallelize_your_own")
    for line in ("*.qkv: packed_colwise", "*.down: rowwise"):
        assert line in output
    held = [int(n) for n in re.findall(r"rank \d holds (\d+) of 37722 elements", output)]
    assert len(held) == 2 and max(held) < 0.55 * 37722
    assert "The split model trained as the whole one." in output


@pytest.mark.slow
def test_the_trainer_of_transformers_sees_no_difference() -> None:
    output = run("trainer_transformers")
    assert output.count("step ") == 6
    assert "The Trainer saw no difference." in output
