"""Training checkpoints over pipeline stages: written in one layout, continued in every other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import colrow
from colrow.checkpoint.training import TrainingCheckpoints
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.models.decoder import Decoder
from colrow.train.optimizer import adamw
from tests.pipeline.layouts import TIED, Pipe, make_stepper
from tests.pipeline.layouts import make_mesh as pipe_mesh
from tests.ranks import RankPool
from tests.train import layouts as train_layouts

FIRST, SECOND = 3, 2
# Four layers, so that four ranks have one each; vocabulary and MLP that do not divide; a tied
# embedding, which is on the first and on the last stage.
CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 31,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    dp: int = 1
    split: str | None = None

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        split = f"-{self.split}" if self.split else ""
        return f"tp{self.tp}-pp{self.pp}-dp{self.dp}{split}"


LAYOUTS = [
    Layout(),
    Layout(tp=4),
    Layout(pp=4),
    Layout(tp=2, pp=2, split="3,1"),
    Layout(pp=2, dp=2),
    Layout(pp=2, split="1,3"),
]


def make_mesh(world: ParallelGroup, layout: Layout) -> Mesh:
    """The grid on the first ranks of the pool."""
    one, device = ParallelGroup.single, torch.device("cpu")
    if layout.ranks == 4:
        return colrow.init_mesh(tp=layout.tp, pp=layout.pp, dp=layout.dp, device="cpu")
    if layout.ranks == 1:
        return Mesh(one(), one("dp"), one("pp"), None, device)
    assert layout.pp == layout.ranks == 2 and world.group is not None
    grid = DeviceMesh.from_group(world.group, "cpu", mesh_dim_names=("pp",))
    pp = ParallelGroup(world.group, world.rank, world.size, "pp")
    return Mesh(one(), one("dp"), pp, grid, device, ends=pp)


def start(world: ParallelGroup, layout: Layout, seed: int) -> tuple[Mesh, Decoder, Any]:
    mesh = make_mesh(world, layout)
    model = colrow.from_config(
        CONFIG, mesh, seed=seed, dtype=torch.float64, layer_split=layout.split
    )
    return mesh, model, adamw(model)


def step(model: Decoder, optimizer: Any, index: int) -> None:
    """With gradients that are functions of the weights, so that no layout changes them."""
    for parameter in model.parameters():
        parameter.grad = (parameter.detach() * (index + 2)).sin() + 0.1 * index
    optimizer.step()


def save(world: ParallelGroup, layout: Layout, directory: Path) -> dict[str, Tensor] | None:
    """Three steps, a checkpoint, two more; the weights after them, on rank 0."""
    mesh, model, optimizer = start(world, layout, seed=0)
    checkpoints = TrainingCheckpoints(directory / str(layout), mesh, group=world.group)
    for index in range(FIRST):
        step(model, optimizer, index)
    checkpoints.save(FIRST, model, optimizer, {"name": str(layout)})
    checkpoints.wait()
    for index in range(SECOND):
        step(model, optimizer, FIRST + index)
    return colrow.full_state_dict(model)


def continue_from(
    world: ParallelGroup, layout: Layout, directory: Path, names: list[str]
) -> dict[str, dict[str, Tensor] | None]:
    """Two steps after each of the checkpoints; the weights, on rank 0."""
    found = {}
    for name in names:
        mesh, model, optimizer = start(world, layout, seed=7)  # other weights, to be replaced
        checkpoints = TrainingCheckpoints(directory / name, mesh, group=world.group)
        assert checkpoints.latest() == FIRST
        assert checkpoints.load(FIRST, model, optimizer) == {"name": name}
        for parameter in model.parameters():
            state = optimizer.state[parameter]
            assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == FIRST
        for index in range(SECOND):
            step(model, optimizer, FIRST + index)
        found[name] = colrow.full_state_dict(model)
    return found


@pytest.fixture(scope="module")
def saved(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of each layout, and one rank's weights with no break."""
    directory = tmp_path_factory.mktemp("checkpoints")
    expected: dict[str, Tensor] = ranks(1, save, LAYOUTS[0], directory)[0]
    for layout in LAYOUTS[1:]:
        found = ranks(layout.ranks, save, layout, directory)[0]
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-12, atol=1e-14, msg=name)
    return directory, expected


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n.dp == 1 and n.ranks != 2], ids=str)
def test_layouts_continue_from_all_others(
    ranks: RankPool, saved: tuple[Path, dict[str, Tensor]], layout: Layout
) -> None:
    directory, expected = saved
    names = [str(other) for other in LAYOUTS]
    for name, found in ranks(layout.ranks, continue_from, layout, directory, names)[0].items():
        assert found.keys() == expected.keys(), name
        for key, weight in expected.items():
            torch.testing.assert_close(
                found[key], weight, rtol=1e-12, atol=1e-14, msg=f"{name} {key}"
            )


def test_names_and_boxes_are_those_of_one_rank(saved: tuple[Path, dict[str, Tensor]]) -> None:
    """A tied embedding is stored once, though two stages have it."""

    def index(layout: Layout) -> dict[str, Any]:
        path = saved[0] / str(layout) / f"step-{FIRST:08d}" / "index.json"
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    alone, stages = index(Layout()), index(Layout(pp=4))
    assert stages["tensors"].keys() == alone["tensors"].keys()
    assert stages["state"]["optimizer"] == alone["state"]["optimizer"]
    for name, tensor in stages["tensors"].items():
        assert tensor["shape"] == alone["tensors"][name]["shape"]
        assert len(tensor["chunks"]) == len(alone["tensors"][name]["chunks"]), name
    assert len(stages["files"]) == 4


def losses_of(
    world: ParallelGroup,
    pipe: Pipe | None,
    tokens: Path,
    directory: Path,
    first: int,
    last: int,
    saves: bool,
) -> list[float]:
    """Steps of training in a pipeline, or with ``world`` as tp; from the checkpoint at ``first``,
    and with one at ``last`` where it ``saves``."""
    if pipe is None:
        plain = train_layouts.Layout(tp=world.size)
        mesh = train_layouts.make_mesh(world, plain)
        stepper = train_layouts.make_stepper(
            mesh, plain, tokens, config=TIED, clip=train_layouts.CLIP
        )
    else:
        mesh = pipe_mesh(world, pipe)
        stepper = make_stepper(mesh, pipe, tokens)
    checkpoints = TrainingCheckpoints(directory, mesh, group=world.group)
    if first:
        checkpoints.load(first, stepper.model, stepper.optimizer)
    found = [stepper.step(index, 1e-3).loss for index in range(first, last)]
    if saves:
        checkpoints.save(last, stepper.model, stepper.optimizer, {})
        checkpoints.wait()
    return found


def test_training_goes_on_in_another_layout(ranks: RankPool, tokens: Path, tmp_path: Path) -> None:
    """Begun on tp 2 x pp 2, continued as tp 4, on one rank, and as pp 4, against no break."""
    whole = ranks(1, losses_of, None, tokens, tmp_path, 0, 5, False)[0]
    begun = ranks(4, losses_of, Pipe(pp=2, tp=2), tokens, tmp_path, 0, 3, True)[0]
    assert begun == pytest.approx(whole[:3], rel=1e-12)
    sharded = Pipe(pp=2, dp=2, fsdp=True)
    for size, pipe in ((4, None), (1, None), (4, Pipe(pp=4)), (4, Pipe(pp=2, tp=2)), (4, sharded)):
        found = ranks(size, losses_of, pipe, tokens, tmp_path, 3, 5, False)[0]
        assert found == pytest.approx(whole[3:], rel=1e-12), (size, pipe)
