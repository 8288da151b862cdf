"""Many users at once: how long they wait with continuous batching. No torch.

Every step decodes one token for each user who is being answered, and reads at most a budget of new
prompt tokens (Yu et al. 2022, Orca; Agrawal et al. 2024, arXiv 2403.02310, chunked prefills). Users
send their next request when they have their answer, so as many are being served as there are.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from colrow.planner.hardware import Hardware
from colrow.planner.inference import ServingPrediction, predict_serving
from colrow.planner.model import ModelShape
from colrow.planner.serving import Serving

PROMPT_TOKENS_PER_STEP = 512
P95 = 0.95


@dataclass(frozen=True)
class Users:
    """What users of one replica see.

    Attributes:
        users: how many are served at once.
        token_seconds: mean time between two tokens of an answer.
        token_seconds_p95: of 20 tokens 19 come within this time.
        first_token_seconds: reading a prompt when a request begins, others' prompts before it not
            counted.
        first_token_seconds_p95: with as many prompts before it as 19 of 20 requests find.
        tokens_per_second: of all answers of a replica together.
        fits: whether their keys and values fit.
        prediction: memory and time of a step without prompts.
    """

    users: int
    token_seconds: float
    token_seconds_p95: float
    first_token_seconds: float
    first_token_seconds_p95: float
    tokens_per_second: float
    fits: bool
    prediction: ServingPrediction


USER_VALUES = tuple(field.name for field in fields(Users) if field.name != "prediction")


def predict_users(model: ModelShape, serving: Serving, hardware: Hardware, users: int) -> Users:
    """The steady state with so many users of one replica.

    A user's request takes ``prompt / budget`` steps of reading and ``new_tokens`` steps of
    decoding. Steps that also read a prompt are longer by its chunk's forward pass.

    Raises:
        ValueError: for fewer than one user, or answers without tokens.
    """
    if users < 1:
        raise ValueError(f"users={users}: at least 1 is needed")
    if serving.new_tokens < 1:
        raise ValueError("an answer has at least one token: give new_tokens")
    chunk = min(PROMPT_TOKENS_PER_STEP, serving.prompt)
    reading = -(-serving.prompt // chunk)  # steps in which a prompt is read
    # Of all users so many decode; the others' prompts are read, one chunk in a step.
    share = serving.new_tokens / (serving.new_tokens + reading)
    decoding = max(1, round(users * share))
    # A prompt at a time: with more waiting than a step can read, users queue and fewer decode.
    most = max(1, serving.new_tokens // reading)
    queued = max(0, users - reading - most)
    decoding = min(decoding, most)
    busy = min(1.0, decoding * reading / serving.new_tokens)  # share of steps that read a chunk

    step = predict_serving(model, replace(serving, batch=decoding), hardware)
    one = replace(serving, batch=1, prompt=chunk, new_tokens=1)
    chunk_seconds = predict_serving(model, one, hardware).prefill_seconds
    # The weights are read once for both: the chunk's own reading of them falls away.
    chunk_seconds = max(chunk_seconds - step.token.weights, 0.1 * chunk_seconds)
    plain, longer = step.token_seconds, step.token_seconds + chunk_seconds
    mean = (1 - busy) * plain + busy * longer
    waiting = users - decoding if queued else min(users - decoding, 1)
    everybody = predict_serving(model, replace(serving, batch=users), hardware)
    return Users(
        users=users,
        token_seconds=mean,
        token_seconds_p95=longer if busy > 1 - P95 else plain,
        first_token_seconds=reading * longer,
        first_token_seconds_p95=reading * longer * (1 + max(waiting, P95 * busy * reading)),
        tokens_per_second=decoding / mean,
        fits=everybody.fits,
        prediction=everybody,
    )


def most_users(
    model: ModelShape, serving: Serving, hardware: Hardware, token_seconds_p95: float
) -> Users | None:
    """The most users of one replica whose 95th percentile between tokens stays within a limit.

    None when not even one user's does, or the weights do not fit.
    """
    if not token_seconds_p95 > 0:
        raise ValueError(f"a limit of {token_seconds_p95} s between tokens: must be positive")

    def good(users: int) -> Users | None:
        found = predict_users(model, serving, hardware, users)
        return found if found.fits and found.token_seconds_p95 <= token_seconds_p95 else None

    best = good(1)
    if best is None:
        return None
    low, high = 1, 2
    while high <= 1 << 16 and (found := good(high)):
        best, low, high = found, high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        found = good(middle)
        if found:
            best, low = found, middle
        else:
            high = middle
    return best
