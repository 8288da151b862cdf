"""One architecture through the code of ``colrow generate``: from files, to transformers' tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.any_model.loading import load_model
from colrow.comm.mesh import Mesh
from colrow.generation.answer import padded
from colrow.generation.generate import generate
from colrow.tiny_models.architectures import Architecture, build
from colrow.tiny_models.example_batch import MUSIC, prompt
from colrow.verification.in_place import Outcome, process_mesh
from colrow.verification.model_run import NEW_TOKENS
from colrow.verification.reference import full_precision, quiet_transformers

_SHORTER = 2  # tokens that the second prompt has less, so that it is padded


def generates(architecture: Architecture, tp: int, directory: str) -> Outcome | None:
    """Saves a tiny model, loads it as ``colrow generate`` does, and continues two prompts.

    Every rank of a world of ``tp`` must call it. Passed is what gives both prompts, in one batch,
    the tokens that transformers' whole model gives each of them alone, in fp64.

    Args:
        directory: an empty one, the same for all ranks.

    Returns:
        The outcome on rank 0, None elsewhere.

    Communicates: besides what the split model sends, a short message.
    """
    mesh = process_mesh(tp)
    whole: list[Any] = ["", [], []]  # a problem, prompts, and the tokens that continue them
    if mesh.tp.rank == 0:
        whole = _whole(architecture, directory)
    dist.broadcast_object_list(whole, group=mesh.tp.group, group_src=0)
    problem, prompts, expected = whole

    def outcome(verdict: str, reason: str = "", greedy: bool | None = None) -> Outcome | None:
        about = (architecture.name, architecture.task, "generate", architecture.even, tp)
        done = Outcome(*about, verdict, reason=reason, greedy=greedy)
        return done if mesh.tp.rank == 0 else None

    if problem:
        return outcome("not run", problem)
    try:
        tokens = _continued(directory, mesh, prompts)
    except (ValueError, NotImplementedError) as error:  # on all ranks alike
        return outcome("refused", " ".join(str(error).split()))
    if tokens == expected:
        return outcome("passed", greedy=True)
    return outcome("failed", f"{tokens} instead of {expected}", greedy=False)


def _continued(directory: str, mesh: Mesh, prompts: list[list[int]]) -> list[list[int]]:
    ids, mask = padded(prompts)
    with quiet_transformers(), full_precision():  # also in the split's own check of itself
        model = load_model(directory, mesh, dtype=torch.float64).for_decoding()
        result = generate(model, ids, attention_mask=mask, max_new_tokens=NEW_TOKENS)
    return result.token_ids


def _whole(architecture: Architecture, directory: str) -> list[Any]:
    """What went wrong, the prompts, and the tokens of the whole model, which is saved."""
    if architecture.model_type in MUSIC:
        return ["continues streams of sound, not a text", [], []]
    try:
        from transformers import GenerationConfig

        model: Any = build(architecture).eval()
        # Without what some models do to logits besides: tokens that are forced, or forbidden.
        model.generation_config = GenerationConfig(pad_token_id=0)
        start = prompt(architecture, model)
        if start is None or not model.can_generate():
            return ["does not continue a text", [], []]
        ids: Tensor = start["input_ids"]
        prompts = [ids[0].tolist(), ids[0, _SHORTER:].tolist()]
        with quiet_transformers(), full_precision():
            expected = [_tokens(model, tokens) for tokens in prompts]
        model.save_pretrained(directory)
    except Exception as error:  # of the whole model, whatever its code raises
        return [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", [], []]
    return ["", prompts, expected]


def _tokens(model: Any, tokens: list[int]) -> list[int]:
    found: Tensor = model.generate(
        torch.tensor([tokens]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    return found[0, len(tokens) :].tolist()
