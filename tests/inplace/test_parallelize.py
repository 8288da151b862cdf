"""Models made parallel in place, against themselves whole."""

import gc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import colrow
from colrow.comm import primitives
from colrow.comm.group import ParallelGroup
from colrow.comm.mesh import Mesh
from colrow.inplace.analysis import analyse
from colrow.inplace.api import plan_for
from colrow.inplace.apply import agreement
from colrow.tiny_models.architectures import architectures, build
from colrow.verification.in_place import compare_on
from tests.ranks import RankPool

LIMIT = 1e-10


class OwnModel(nn.Module):
    """Nobody's architecture: Q, K and V of each head side by side, and a gate behind its MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 5, 4
        self.embedding = nn.Embedding(31, 20)
        self.mixed = nn.Linear(20, 60)
        self.back = nn.Linear(20, 20)
        self.norm = nn.LayerNorm(20)
        self.both = nn.Linear(20, 26)
        self.down = nn.Linear(13, 20)
        self.head = nn.Linear(20, 31)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        qkv = self.mixed(x).view(*ids.shape, self.heads, 3, self.size)
        q, k, v = qkv.transpose(1, 2).unbind(3)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.back(y.transpose(1, 2).reshape(*ids.shape, self.heads * self.size))
        up, gate = self.both(self.norm(x)).chunk(2, -1)
        logits: Tensor = self.head(x + self.down(up * gate.sigmoid()))
        return logits


def mesh_of(tp: ParallelGroup) -> Mesh:
    single = ParallelGroup.single
    return Mesh(tp, single("dp"), single("pp"), None, torch.get_default_device())


def check_own_model(tp: ParallelGroup) -> None:
    mesh = mesh_of(tp)
    torch.manual_seed(0)
    model = OwnModel().double()
    ids = torch.randint(0, 31, (2, 7))
    expected = model(ids)
    expected.square().sum().backward()
    whole = {n: p.grad for n, p in model.named_parameters()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.zero_grad()
    assert colrow.parallelize(model, mesh, example_inputs={"ids": ids}) is model
    result = model(ids)
    result.square().sum().backward()
    torch.testing.assert_close(result, expected, rtol=LIMIT, atol=LIMIT)
    split = [n for n, p in model.named_parameters() if p.shape != weights[n].shape]
    assert {"mixed.weight", "back.weight", "both.weight", "down.weight", "head.weight"} < {*split}
    grads, state = colrow.full_grads(model), colrow.full_state_dict(model)
    if mesh.tp.rank == 0:
        for name, grad in whole.items():
            torch.testing.assert_close(grads[name], grad, rtol=LIMIT, atol=LIMIT)
            assert torch.equal(state[name], weights[name])


@pytest.mark.parametrize("n", [2, 3])
def test_a_model_of_ones_own(ranks: RankPool, n: int) -> None:
    ranks(n, check_own_model)


# Hard-coded heads and positions by slopes; fused Conv1D; bias tables; experts; latent attention.
@pytest.mark.parametrize("name", ["bloom", "gpt2", "t5", "gpt_oss", "deepseek_v3", "rwkv"])
def test_transformers_models(ranks: RankPool, name: str) -> None:
    ranks(3, check_architecture, name)


def check_architecture(tp: ParallelGroup, name: str) -> None:
    outcome = compare_on(mesh_of(tp), architectures([name])[0])
    assert outcome is None or outcome.verdict == "passed", outcome


def check_saving(tp: ParallelGroup, directory: str) -> None:
    mesh = mesh_of(tp)
    model: Any = build(architectures(["gpt2"])[0], torch.float32)
    if mesh.tp.rank == 0:
        model.save_pretrained(f"{directory}/whole")
    colrow.parallelize(model, mesh)
    colrow.save_pretrained(model, f"{directory}/split")
    with pytest.raises(NotADirectoryError if tp.rank == 0 else RuntimeError):
        colrow.save_pretrained(model, f"{directory}/whole/config.json/below")
    for part in (model, model.transformer):
        with pytest.raises(ValueError, match="resize the model before it is parallelised"):
            part.resize_token_embeddings(200)
        with pytest.raises(ValueError, match=r"call colrow\.save_pretrained"):
            part.save_pretrained(directory, state_dict=part.state_dict())
    part = nn.Sequential(model)
    part.save_pretrained = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="only the part '0' of this Sequential"):
        colrow.save_pretrained(part, directory)


def test_files_are_those_of_the_whole_model(ranks: RankPool, tmp_path: Path) -> None:
    ranks(2, check_saving, str(tmp_path))
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert "model.safetensors" in names
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "split" / name).read_bytes()


def check_unequal_ranks(tp: ParallelGroup) -> None:
    mesh = mesh_of(tp)
    torch.manual_seed(mesh.tp.rank)
    with pytest.raises(ValueError, match=r"different values of embedding\.weight"):
        colrow.parallelize(OwnModel(), mesh, example_inputs={"ids": torch.zeros(1, 4).long()})


def test_ranks_that_start_from_different_models(ranks: RankPool) -> None:
    ranks(2, check_unequal_ranks)


def check_ranks_that_disagree(tp: ParallelGroup) -> None:
    mesh, inputs = mesh_of(tp), {"ids": torch.zeros(1, 4).long()}
    model = OwnModel()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    plans: list[Any] = ["auto", {"both": "colwise", "down": "rowwise"}]
    with pytest.raises(ValueError, match="would split the model in different ways"):
        colrow.parallelize(model, mesh, plans[tp.rank], example_inputs=inputs)
    message = "unknown style 'sideways'" if tp.rank else "another rank could not look"
    with pytest.raises((ValueError, RuntimeError), match=message):
        plan = {"both": "sideways"} if tp.rank else "auto"
        colrow.parallelize(model, mesh, plan, example_inputs=inputs)
    # Where each rank computes in the model, the one that fails must not go on to a collective.
    usual, agreement._PATIENCE = agreement._PATIENCE, timedelta(seconds=0.2)
    try:
        if tp.rank:
            with pytest.raises(RuntimeError, match=r"tp rank 1 alone failed .*: of no use"):
                agreement.all_arrive("of no use", tp)
            primitives.all_reduce(torch.ones(1), tp)
        else:
            primitives.all_reduce(torch.ones(1), tp)
            agreement.all_arrive("", tp)
        agreement.all_arrive("of all", tp)
    finally:
        agreement._PATIENCE = usual


def test_ranks_that_find_different_things_or_fail_alone(ranks: RankPool) -> None:
    ranks(2, check_ranks_that_disagree)


def check_without_gradients(tp: ParallelGroup) -> None:
    torch.manual_seed(0)
    ids = torch.arange(12).view(2, 6)
    made = pytest.raises(ValueError, match=r"made in torch\.inference_mode")
    with torch.inference_mode(), made:
        colrow.parallelize(OwnModel(), mesh_of(tp), example_inputs={"ids": ids})
    model = OwnModel().double()
    expected = model(ids)
    with torch.inference_mode():
        colrow.parallelize(model, mesh_of(tp), example_inputs={"ids": ids})
    torch.testing.assert_close(model(ids), expected, rtol=LIMIT, atol=LIMIT)
    with pytest.raises(ValueError, match="the part 'inner' of this model has been parallelised"):
        outer = nn.ModuleDict({"inner": model})
        colrow.parallelize(outer, mesh_of(tp), example_inputs={"ids": ids})


def test_a_model_split_where_no_gradients_are_recorded(ranks: RankPool) -> None:
    ranks(2, check_without_gradients)


def plan_of(model: nn.Module, tp: int = 2) -> Any:
    return plan_for(model, tp, example_inputs={"ids": torch.arange(12).view(2, 6) % 7})


def test_a_plan_says_what_and_why() -> None:
    plan = plan_of(OwnModel())
    assert plan["mixed"] == "colwise"
    assert plan["both"] == "packed_colwise"
    assert plan["back"] == plan["down"] == "rowwise"
    rows = {row.module: row for row in plan.rows}
    assert rows["norm"].style == "replicate"
    assert rows["mixed"].parameters == 60 * 21


def test_plans_that_cannot_be_followed() -> None:
    def refused(plan: dict[str, str], message: str) -> Callable[[], None]:
        def run() -> None:
            with pytest.raises(ValueError, match=message):
                analyse(OwnModel(), 2, plan, {"ids": torch.arange(12).view(2, 6) % 7})

        return run

    refused({"nothing": "colwise"}, "'nothing' matches no module")()
    refused({"mixed": "rowwise", "back": "rowwise"}, "the plan says 'rowwise' for mixed")()
    refused({"norm": "colwise", "mixed": "colwise", "back": "rowwise"}, "'colwise' for norm")()
    pair = {"mixed": "colwise", "back": "rowwise"}
    refused(pair | {"norm.weight": "split_parameter"}, "'split_parameter' for norm.weight")()
    refused([*pair], r"give 'auto', 'transformers' or a dictionary")()  # type: ignore[arg-type]


def test_a_directory_whose_configuration_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("no JSON")
    with pytest.raises(ValueError, match=r"config\.json is not JSON that can be read"):
        plan_for(tmp_path)


def check_row_input(tp: ParallelGroup) -> None:
    torch.manual_seed(0)
    model = OwnModel()
    memory = StorageWeakRef(model.mixed.weight.untyped_storage())
    colrow.parallelize(model, mesh_of(tp), example_inputs={"ids": torch.arange(8).view(2, 4)})
    with pytest.raises(ValueError, match=r"back holds \d+ input features on this rank, .* of 20"):
        model.back(torch.ones(1, 4, 20))
    gc.collect()
    assert memory.expired()  # nothing keeps the memory of the whole weights


def test_a_row_parallel_layer_wants_its_part(ranks: RankPool) -> None:
    ranks(2, check_row_input)


def check_dropout(tp: ParallelGroup, name: str) -> tuple[float, float]:
    """A number drawn after a step in training, and the norm's output's sum."""
    model = build(architectures([name])[0], torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    seen: list[float] = []
    colrow.parallelize(model, mesh_of(tp)).train()
    last = [m for m in model.modules() if isinstance(m, nn.LayerNorm)][-1]
    last.register_forward_hook(lambda _, args, y: seen.append(float(y.sum())))
    torch.manual_seed(5)
    model(input_ids=torch.arange(8).view(1, 8) + 5)
    return float(torch.rand(1)), seen[0]


def test_ranks_drop_the_same_of_what_they_all_have(ranks: RankPool) -> None:
    # Five heads on two ranks: they draw masks of different sizes for their own heads.
    first, second = ranks(2, check_dropout, "gpt2")
    assert first == second
