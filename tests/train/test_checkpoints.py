"""Training checkpoints in every layout, read in every other, against steps without a break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from colrow.checkpoint.training import TrainingCheckpoints
from colrow.comm.group import ParallelGroup
from tests.ranks import RankError, RankPool
from tests.train.layouts import LAYOUTS, Layout, make_mesh, make_stepper

FIRST, SECOND, RATE = 3, 2, 1e-3


def save(world: ParallelGroup, layout: Layout, tokens: Path, directory: Path) -> list[float]:
    """Three steps, a checkpoint, two more steps; their losses."""
    mesh = make_mesh(world, layout)
    stepper = make_stepper(mesh, layout, tokens, microbatch=8 // layout.dp)
    checkpoints = TrainingCheckpoints(directory / str(layout), mesh, group=world.group)
    losses = [stepper.step(index, RATE).loss for index in range(FIRST)]
    checkpoints.save(FIRST, stepper.model, stepper.optimizer, {"losses": losses})
    checkpoints.wait()
    return losses + [stepper.step(FIRST + index, RATE).loss for index in range(SECOND)]


def continue_from(
    world: ParallelGroup, layout: Layout, tokens: Path, directory: Path, names: list[str]
) -> dict[str, list[float]]:
    """Two steps from each of the checkpoints, in this layout; their losses."""
    mesh, found = make_mesh(world, layout), {}
    other = {"seed": 7, "microbatch": 8 // layout.dp}  # its weights are to be replaced
    stepper = make_stepper(mesh, layout, tokens, **other)
    for name in names:
        stepper.optimizer.state.clear()
        checkpoints = TrainingCheckpoints(directory / name, mesh, group=world.group)
        assert checkpoints.latest() == FIRST
        state = checkpoints.load(FIRST, stepper.model, stepper.optimizer)
        assert len(state["losses"]) == FIRST
        found[name] = [stepper.step(FIRST + index, RATE).loss for index in range(SECOND)]
    return found


@pytest.fixture(scope="module")
def saved(
    ranks: RankPool, tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[float]]]:
    """A checkpoint of each layout, and the losses with no break."""
    directory = tmp_path_factory.mktemp("checkpoints")
    losses = {
        str(layout): ranks(layout.ranks, save, layout, tokens, directory)[0] for layout in LAYOUTS
    }
    return directory, losses


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_continues_from_every_other(
    ranks: RankPool, tokens: Path, saved: tuple[Path, dict[str, list[float]]], layout: Layout
) -> None:
    directory, losses = saved
    found = ranks(layout.ranks, continue_from, layout, tokens, directory, list(losses))[0]
    for name, continued in found.items():
        expected = losses[name][FIRST:]
        if name == str(layout):
            assert continued == expected, name  # bitwise
        assert continued == pytest.approx(expected, rel=1e-12), name


def test_unequal_shards_are_divided_anew(
    ranks: RankPool, tokens: Path, saved: tuple[Path, dict[str, list[float]]], tmp_path: Path
) -> None:
    expected = saved[1]["tp1"]
    first, second = Layout(tp=2, tensor_split="4,1"), Layout(tp=3, tensor_split="1,2,2")
    losses = ranks(2, save, first, tokens, tmp_path)[0]
    assert losses == pytest.approx(expected, rel=1e-12)
    for layout in (second, Layout()):
        found = ranks(layout.ranks, continue_from, layout, tokens, tmp_path, [str(first)])[0]
        assert found[str(first)] == pytest.approx(expected[FIRST:], rel=1e-12)


def whole_state(world: ParallelGroup, directory: Path, tokens: Path) -> dict[str, Tensor]:
    layout = Layout()
    stepper = make_stepper(make_mesh(world, layout), layout, tokens, seed=7)
    checkpoints = TrainingCheckpoints(directory, stepper.mesh, group=world.group)
    checkpoints.load(FIRST, stepper.model, stepper.optimizer)
    found = {}
    for name, parameter in stepper.model.named_parameters():
        found[name] = parameter.detach().clone()
        for key, value in stepper.optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value
    return found


def test_parameters_and_moments_are_those_of_one_process(
    ranks: RankPool, tokens: Path, saved: tuple[Path, dict[str, list[float]]]
) -> None:
    directory, losses = saved
    expected = ranks(1, whole_state, directory / "tp1", tokens)[0]
    assert sum(name.endswith("exp_avg_sq") for name in expected) * 4 == len(expected)
    for name in losses:
        found = ranks(1, whole_state, directory / name, tokens)[0]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-9, atol=1e-13, msg=f"{name} {key}"
            )


def load_one(world: ParallelGroup, tokens: Path, directory: Path, **options: Any) -> None:
    stepper = make_stepper(make_mesh(world, Layout(tp=world.size)), Layout(), tokens, **options)
    checkpoints = TrainingCheckpoints(directory, stepper.mesh, group=world.group)
    checkpoints.load(FIRST, stepper.model, stepper.optimizer)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "index", "index_value", "escape"])
def test_a_damaged_checkpoint_is_refused_by_all_ranks(
    ranks: RankPool,
    tokens: Path,
    saved: tuple[Path, dict[str, list[float]]],
    tmp_path: Path,
    damage: str,
) -> None:
    import shutil

    shutil.copytree(saved[0] / "tp2", tmp_path / "copy")
    step = tmp_path / "copy" / f"step-{FIRST:08d}"
    file, index = step / "rank-00001.safetensors", step / "index.json"
    expected = "rank-00001.safetensors"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "remove":
        file.unlink()
    elif damage == "index":
        index.write_bytes(index.read_bytes()[:100])
        expected = "index.json is damaged"
    else:
        values = json.loads(index.read_text())
        if damage == "escape":
            values["files"] = {"../../outside": {"bytes": 0, "sha256": ""}}
        else:
            values["state"]["user"]["losses"] = [0.0]
        index.write_text(json.dumps(values))
        expected = "its checksum does not fit its content"
    with pytest.raises(RankError, match=expected) as caught:
        ranks(2, load_one, tokens, tmp_path / "copy")
    assert len(set(caught.value.errors.values())) == 1
    assert caught.value.errors.keys() == {0, 1}


def save_many(world: ParallelGroup, tokens: Path, directory: Path) -> list[list[str]]:
    layout = Layout(tp=world.size)
    stepper = make_stepper(make_mesh(world, layout), layout, tokens)
    stepper.step(0, RATE)
    checkpoints = TrainingCheckpoints(directory, stepper.mesh, keep=2, group=world.group)
    seen = []
    for step in (1, 2, 3, 3):
        checkpoints.save(step, stepper.model, stepper.optimizer, {})
        checkpoints.wait()
        seen.append(sorted(path.name for path in directory.glob("step-*")))
        if world.group is not None:
            torch.distributed.barrier(world.group)
    return seen


def test_the_last_k_stay(ranks: RankPool, tokens: Path, tmp_path: Path) -> None:
    one, two, three = (f"step-{step:08d}" for step in (1, 2, 3))
    assert ranks(2, save_many, tokens, tmp_path)[0] == [
        [one],
        [one, two],
        [two, three],
        [two, three],
    ]


def save_on_full_disk(world: ParallelGroup, tokens: Path, directory: Path) -> str:
    """Files of rank 1 cannot grow beyond 64 KiB, as on a disk that is full there."""
    import resource

    layout = Layout(tp=world.size)
    stepper = make_stepper(make_mesh(world, layout), layout, tokens)
    checkpoints = TrainingCheckpoints(directory, stepper.mesh, group=world.group)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        checkpoints.save(1, stepper.model, stepper.optimizer, {})
        checkpoints.wait()
    except RuntimeError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


def test_a_full_disk_publishes_nothing(ranks: RankPool, tokens: Path, tmp_path: Path) -> None:
    messages = ranks(2, save_on_full_disk, tokens, tmp_path / "run")
    for message in messages:
        assert "the checkpoint of step 1 could not be written" in message
        assert "rank 1" in message
        assert "File too large" in message
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_another_model_is_refused(
    ranks: RankPool, tokens: Path, saved: tuple[Path, dict[str, list[float]]]
) -> None:
    from tests.train.layouts import CONFIG

    smaller = {**CONFIG, "intermediate_size": 51}
    with pytest.raises(RankError, match="another model"):
        ranks(2, load_other, tokens, saved[0] / "tp1", smaller)


def load_other(world: ParallelGroup, tokens: Path, directory: Path, config: dict[str, Any]) -> None:
    load_one(world, tokens, directory, config=config)


def test_nothing_on_disk_is_a_pickle(saved: tuple[Path, dict[str, list[float]]]) -> None:
    files = [path for path in saved[0].rglob("*") if path.is_file()]
    assert {path.suffix or path.name for path in files} == {".json", ".safetensors", ".lock"}
    for path in files:
        if path.name == ".lock":
            assert path.read_text().strip().isprintable()  # who holds it
