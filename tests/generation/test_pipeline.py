"""Generation through stages, in pipelines alone and with tensor shards: the tokens of one model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import colrow
from colrow.checkpoint.pretrained import from_pretrained
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Call, record
from colrow.comm.mesh import Mesh
from colrow.generation.answer import Writer, padded
from colrow.generation.generate import Generation, generate
from colrow.generation.sampling_settings import Sampling
from colrow.models.cache import KeyValueCache
from colrow.models.config import common_attention
from colrow.models.decoder import Decoder
from tests.generation import models
from tests.models import tiny
from tests.ranks import RankError, RankPool

NEW, LAYERS = 10, 4
# Tied and not, fused QKV, learned positions, windows and ALiBi.
NAMES = ["qwen2", "gpt2-untied", "bloom", "mistral-window", "gpt_neox"]


@dataclass(frozen=True)
class Pipe:
    pp: int
    layer_split: str
    tp: int = 1
    tensor_split: str = ""
    sequence_parallel: bool = False

    def mesh(self, world: ParallelGroup) -> Mesh:
        if self.tp > 1:
            return colrow.init_mesh(pp=self.pp, tp=self.tp, device="cpu")
        pp = ParallelGroup(world.group, world.rank, world.size, "pp")
        one = ParallelGroup.single
        return Mesh(one(), one("dp"), pp, None, torch.get_default_device())

    def load(self, world: ParallelGroup, path: str) -> Decoder:
        return from_pretrained(
            path,
            self.mesh(world),
            dtype=torch.float64,
            layer_split=self.layer_split,
            tensor_split=self.tensor_split,
            sequence_parallel=self.sequence_parallel,
        )


PIPES = [
    Pipe(2, "1,3"),
    Pipe(3, "1,2,1"),
    Pipe(2, "3,1", 2, "2,1"),
    Pipe(2, "2,2", 2, "1,3", sequence_parallel=True),
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any]]:
    """Checkpoints of four layers, and transformers' models."""
    root = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            kind, keys = tiny.CASES[name]
            layers = {"n_layer" if "n_layer" in keys else "num_hidden_layers": LAYERS}
            patch.setitem(tiny.CASES, name, (kind, {**keys, **layers}))
        return {name: (str(root / name), models.save(name, root / name)) for name in NAMES}


@pytest.fixture(scope="module")
def expected(cases: dict[str, tuple[str, Any]]) -> dict[str, list[list[int]]]:
    """Transformers' greedy answers to the three prompts."""
    found = {
        name: models.reference(model, *models.prompts(), NEW).tolist()
        for name, (_, model) in cases.items()
    }
    assert all(max(len(set(row)) for row in rows) > 3 for rows in found.values())
    return found


def greedy(
    world: ParallelGroup, pipe: Pipe, paths: dict[str, str]
) -> dict[str, tuple[Generation, list[list[int]]]]:
    ids, mask = models.prompts()
    found = {}
    for name, path in paths.items():
        heard: list[list[int]] = []
        model = pipe.load(world, path)
        result = generate(
            model, ids, attention_mask=mask, max_new_tokens=NEW, on_tokens=heard.append
        )
        found[name] = (result, heard)
    return found


@pytest.mark.parametrize("pipe", PIPES, ids=str)
def test_tokens_are_those_of_transformers(
    ranks: RankPool,
    cases: dict[str, tuple[str, Any]],
    expected: dict[str, list[list[int]]],
    pipe: Pipe,
) -> None:
    paths = {name: path for name, (path, _) in cases.items()}
    for found in ranks(pipe.pp * pipe.tp, greedy, pipe, paths):
        for name, (result, heard) in found.items():
            assert result.token_ids == expected[name], name
            assert result.tokens.tolist() == expected[name]
            assert [list(row) for row in zip(*heard, strict=True)] == expected[name]


def variants(world: ParallelGroup, pipe: Pipe, path: str, ends: list[int]) -> list[Any]:
    """One row alone, rows that end at different steps, and sampled tokens."""
    ids, mask = models.prompts()
    model, heard = pipe.load(world, path).for_decoding(), []
    one = generate(model, ids[:1], max_new_tokens=4).token_ids
    ended = generate(
        model,
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        eos_token_ids=ends,
        pad_token_id=0,
        on_tokens=heard.append,
    )
    sampling = Sampling(temperature=1.5, top_k=50, top_p=0.9, seed=5)
    drawn = [
        generate(model, ids, attention_mask=mask, max_new_tokens=6, sampling=how).token_ids
        for how in (sampling, Sampling(temperature=1.5))
    ]
    return [one, ended.tokens.tolist(), ended.token_ids, ended.finished, heard, drawn]


@pytest.mark.parametrize("pipe", [PIPES[0], PIPES[1], PIPES[2]], ids=str)
def test_ends_and_draws_are_those_of_one_rank(
    ranks: RankPool,
    cases: dict[str, tuple[str, Any]],
    expected: dict[str, list[list[int]]],
    pipe: Pipe,
) -> None:
    path, free = cases["qwen2"][0], expected["qwen2"]
    ends = [free[0][2], free[1][5], free[2][7]]
    whole = ranks(1, variants, Pipe(1, "4"), path, ends)[0]
    assert whole[0] == [free[0][:4]]
    assert len({len(row) for row in whole[2]}) > 1  # they do end at different steps
    for found in ranks(pipe.pp * pipe.tp, variants, pipe, path, ends):
        assert found == whole


def traffic(world: ParallelGroup, pipe: Pipe, path: str) -> tuple[list[Call], dict[str, Any]]:
    model = pipe.load(world, path)
    ids, mask = models.prompts()
    with record(model.pipeline.pp) as ledger:
        result = generate(model, ids, attention_mask=mask, max_new_tokens=NEW)
    heads = model.config.blocks[0].attention.heads(model.division).key_value.size(model.tp.rank)
    blocks = model.pipeline.split.sizes[model.pipeline.pp.rank]
    per_position = 2 * blocks * heads * common_attention(model.config).head_dim * 8
    assert result.cache_bytes == (9 + 4 + 1 + 3 * NEW) * per_position
    held = sum(parameter.numel() for parameter in model.parameters())
    assert model.weight_bytes_per_rank()[world.rank] == 8 * held
    return ledger.calls, {"hidden": model.config.hidden_size}


def test_messages_and_memory_are_what_the_sizes_say(
    ranks: RankPool, cases: dict[str, tuple[str, Any]]
) -> None:
    pipe = Pipe(3, "1,2,1")
    found = ranks(3, traffic, pipe, cases["qwen2"][0])
    for rank, (calls, sizes) in enumerate(found):
        count: Counter[tuple[str, str]] = Counter()
        total: Counter[tuple[str, str]] = Counter()
        for call in calls:
            assert (call.group, call.phase) == ("pp", "forward")
            count[call.op, call.layer] += 1
            total[call.op, call.layer] += call.bytes
        # Each row is a part of its own, and goes without the padding of the longest.
        hidden = (9 + 4 + 1 + 3 * (NEW - 1)) * sizes["hidden"] * 8
        turns, tokens = 3 * NEW, 3 * NEW * 8
        expected = {("all_reduce", "inputs"): (1, 16)}
        if rank == 2:
            expected["send", "tokens"] = (2 * turns, 2 * tokens)
        else:
            expected["recv", "tokens"] = (turns, tokens)
            expected["send", ("blocks.0|1", "blocks.2|3")[rank]] = (turns, hidden)
        if rank > 0:
            expected["recv", ("", "blocks.0|1", "blocks.2|3")[rank]] = (turns, hidden)
        assert {key: (count[key], total[key]) for key in count} == expected


def in_turns(world: ParallelGroup, pipe: Pipe, path: str) -> list[str]:
    """What a stage does, in order: the parts of the batch that it works on."""
    model, order = pipe.load(world, path), []
    forward = model.forward

    def noted(x: torch.Tensor, **options: Any) -> torch.Tensor:
        order.append(f"{x.shape[0]}x{x.shape[1]}")
        return forward(x, **options)

    model.forward = noted  # type: ignore[method-assign]
    ids = models.prompts()[0]
    generate(model, ids, max_new_tokens=3)
    return order


def test_parts_of_the_batch_take_turns(ranks: RankPool, cases: dict[str, tuple[str, Any]]) -> None:
    order = ranks(2, in_turns, Pipe(2, "2,2"), cases["qwen2"][0])[0]
    assert order == ["2x9", "1x9", "2x1", "1x1", "2x1", "1x1"]


def refused(world: ParallelGroup, pipe: Pipe, path: str, what: str) -> None:
    if what == "split" and world.rank:
        pipe = Pipe(2, "3,1")
    model = pipe.load(world, path)
    ids = models.prompts()[0] + (world.rank if what == "prompt" else 0)
    generate(model, ids, max_new_tokens=2)


@pytest.mark.parametrize(
    ("what", "message"),
    [("prompt", "different batches"), ("split", "divide the model differently")],
)
def test_stages_that_disagree_are_refused(
    ranks: RankPool, cases: dict[str, tuple[str, Any]], what: str, message: str
) -> None:
    with pytest.raises(RankError) as caught:
        ranks(2, refused, Pipe(2, "2,2"), cases["qwen2"][0], what)
    assert sorted(caught.value.errors) == [0, 1]
    assert all(message in error for error in caught.value.errors.values())


def test_a_cache_of_later_layers_goes_by_their_numbers() -> None:
    cache = KeyValueCache(2, 1, 1, 2, 4, dtype=torch.float32, device="cpu", first_layer=3)
    ones = torch.ones(1, 1, 3, 2)
    cache.update(3, ones, ones)
    assert cache.length == 0
    keys, _ = cache.update(4, 2 * ones, ones)
    assert cache.length == 3 and torch.equal(keys, 2 * ones)


class _Letters:
    """A tokenizer whose tokens are letters: 0 is the end."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(96 + i) for i in ids if i)


def test_answers_are_written_one_behind_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer(_Letters(), 3, [0], stream=True)  # type: ignore[arg-type]
    shown = []
    for tokens in ([1, 4, 0], [2, 0, 0], [0, 0, 0]):
        writer.push(tokens)
        shown.append(capsys.readouterr().out)
    assert shown == ["[1/3]\na", "b", "\n[2/3]\nd\n[3/3]\n\n"]
    assert writer.finish() == ["ab", "d", ""]
    assert capsys.readouterr().out == ""


def test_prompts_of_different_lengths_are_padded_on_the_left() -> None:
    ids, mask = padded([(5,), (6, 7, 8)])
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
