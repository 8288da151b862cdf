"""Many users at once."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from colrow.cli import main
from colrow.planner import find_hardware, find_model
from colrow.planner.inference import predict_serving
from colrow.planner.serving import Serving
from colrow.planner.users import most_users, predict_users

MODEL, H100 = find_model("llama-3-8b"), find_hardware("h100")
SERVING = Serving(prompt=512, new_tokens=256)


def test_one_user_is_alone() -> None:
    found = predict_users(MODEL, SERVING, H100, 1)
    alone = predict_serving(MODEL, SERVING, H100)
    assert found.token_seconds == pytest.approx(alone.token_seconds, rel=0.05)
    assert found.token_seconds_p95 == alone.token_seconds
    assert found.first_token_seconds == pytest.approx(
        alone.prefill_seconds + alone.token_seconds, rel=0.7
    )


def test_more_users_get_more_together_and_wait_longer() -> None:
    found = [predict_users(MODEL, SERVING, H100, users) for users in (1, 8, 64, 200)]
    for few, many in pairwise(found):
        assert many.tokens_per_second > few.tokens_per_second
        assert many.token_seconds > few.token_seconds
        assert many.token_seconds_p95 >= few.token_seconds_p95
        assert many.first_token_seconds_p95 >= many.first_token_seconds
    assert found[2].tokens_per_second > 20 * found[0].tokens_per_second


def test_a_limit_is_kept_and_one_more_user_would_break_it() -> None:
    limit = 0.02
    found = most_users(MODEL, SERVING, H100, limit)
    assert found is not None and found.token_seconds_p95 <= limit and found.fits
    more = predict_users(MODEL, SERVING, H100, found.users + 1)
    assert more.token_seconds_p95 > limit or not more.fits
    assert most_users(MODEL, SERVING, H100, 1e-6) is None
    with pytest.raises(ValueError, match="must be positive"):
        most_users(MODEL, SERVING, H100, 0.0)
    with pytest.raises(ValueError, match="users=0"):
        predict_users(MODEL, SERVING, H100, 0)


def test_memory_limits_users_too() -> None:
    long = replace(SERVING, prompt=8192, new_tokens=4096)
    found = most_users(MODEL, long, H100, 10.0)
    assert found is not None and found.fits
    assert not predict_users(MODEL, long, H100, found.users + 1).fits


def test_the_command_says_what_users_see(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", "llama-3-8b", "--inference", "--gpu", "h100", "--gpus", "1"]
    assert main([*plan, "--users", "32", "--price", "2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "32 users of a replica" in text and "per million tokens" in text
    assert main([*plan, "--token-ms", "0.01"]) == 1
    assert "Not even one" in capsys.readouterr().out
    assert main([*plan, "--users", "3", "--token-ms", "5"]) == 2
    assert "leave one out" in capsys.readouterr().err
