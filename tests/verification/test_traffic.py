"""The ledger's prediction from a configuration is what the layers really send."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import colrow
from colrow.comm.group import ParallelGroup
from colrow.comm.ledger import Call, summarize
from colrow.models.communication import predict_step
from colrow.models.config import ModelConfig
from colrow.models.hf_config import config_from_file
from colrow.planner.catalog import find_model
from colrow.sharding import Sharding
from colrow.verification.traffic import Traffic, dry_run, record_step
from tests.models.tiny import at
from tests.ranks import RankPool


def recorded(
    tp: ParallelGroup, root: Path, names: list[str], dtypes: list[torch.dtype]
) -> dict[str, Traffic]:
    """One step of every model, with every form of sequence parallelism and in these precisions."""
    found = {}
    for name in names:
        for sequence_parallel, keep in ((False, True), (True, True), (True, False)):
            for dtype in dtypes:
                model = colrow.from_config(
                    root / name,
                    tp,
                    dtype=dtype,
                    sharding=Sharding(sequence_parallel, keep_gathered_input=keep),
                )
                key = f"{name} sp={sequence_parallel} keep={keep} {dtype}"
                found[key] = record_step(model, batch=2, sequence=13)
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_recorded_is_predicted(ranks: RankPool, tiny_models: Path, size: int) -> None:
    names = [name for name in at(size) if name != "gpt2-untied"]
    # What a dtype changes does not depend on the number of ranks.
    dtypes = [torch.bfloat16, torch.float32][: 2 if size < 4 else 1]
    by_rank = ranks(size, recorded, tiny_models, names, dtypes, timeout=180)
    for found in by_rank:
        assert len(found) == 3 * len(dtypes) * len(names)
        for name, traffic in found.items():
            assert traffic.recorded == traffic.predicted, name
            assert traffic.seconds is not None and traffic.seconds > 0


def counts(config: ModelConfig, size: int, sequence_parallel: bool) -> dict[tuple[str, str], int]:
    """Calls by phase and operation inside one block."""
    calls = predict_step(
        config,
        config.divide(size),
        batch=1,
        sequence=8,
        sequence_parallel=sequence_parallel,
    )
    found: dict[tuple[str, str], int] = {}
    for call in calls:
        if call.layer.startswith("blocks.0."):
            found[call.phase, call.op] = found.get((call.phase, call.op), 0) + 1
    return found


def test_a_block_sends_what_the_papers_say() -> None:
    """Two all-reduces a direction; two all-gathers and two reduce-scatters with sequences split."""
    config = find_model("gpt3-175b").config
    assert counts(config, 8, False) == {("forward", "all_reduce"): 2, ("backward", "all_reduce"): 2}
    assert counts(config, 8, True) == {
        (phase, op): 2
        for phase in ("forward", "backward")
        for op in ("all_gather", "reduce_scatter")
    }


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_175b_model_is_recorded_without_its_memory(sequence_parallel: bool) -> None:
    config = find_model("gpt3-175b").config
    traffic = dry_run(
        config,
        8,
        batch=1,
        sequence=2048,
        sequence_parallel=sequence_parallel,
        dtype=torch.bfloat16,
        rank=3,
    )
    assert traffic.equal
    assert traffic.seconds is None
    block = [row for row in traffic.recorded if str(row["layer"]).startswith("blocks.95.")]
    # b * s * h * 2 bytes, whatever the collective.
    assert {row["bytes"] for row in block} == {2048 * 12288 * 2}
    assert len(block) == (8 if sequence_parallel else 4)


def test_wire_bytes_are_the_rings() -> None:
    assert Call("all_reduce", "forward", "", 1000, "float32").wire_bytes(4) == 1500
    assert Call("all_gather", "forward", "", 1000, "float32").wire_bytes(4) == 750
    assert Call("reduce_scatter", "forward", "", 1000, "float32").wire_bytes(1) == 0


def test_summaries_differ_when_any_call_does() -> None:
    call = Call("all_reduce", "forward", "blocks.0.mlp.down", 64, "float32")
    other = Call("all_reduce", "backward", "blocks.0.mlp.down", 64, "float32")
    assert summarize([call, other]) == summarize([other, call])
    assert summarize([call, call]) != summarize([call])
    assert summarize([call]) != summarize([other])


def test_one_rank_sends_nothing(tiny_models: Path) -> None:
    traffic = dry_run(config_from_file(tiny_models / "llama"), 1, batch=1, sequence=4)
    assert traffic.recorded == [] == traffic.predicted
