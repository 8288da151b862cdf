"""Models on the meta device, split and read part by part, against the same models whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import colrow
from colrow.checkpoint.opening import open_reader
from colrow.comm.group import ParallelGroup
from colrow.inplace.api import plan_for
from colrow.inplace.weights.file_names import file_names
from colrow.inplace.weights.sources import Cut, Joined, Source, Stacked, Stored, Swapped
from colrow.tiny_models.architectures import architectures, build
from colrow.tiny_models.example_batch import batch
from colrow.verification.comparison import gradient_errors, relative_error
from colrow.verification.reference import full_precision
from tests.inplace.test_parallelize import OwnModel, mesh_of
from tests.ranks import RankPool

LIMIT = 1e-12


def whole_model(name: str) -> Any:
    return build(architectures([name])[0])


def check_directory(tp: ParallelGroup, name: str, directory: str) -> None:
    whole = whole_model(name)
    model: Any = colrow.parallelize(directory, mesh_of(tp), dtype=torch.float64)
    assert not model.training
    model.train(whole.training)
    if name == "mixtral":  # torch's kernel for groups of rows has no fp64
        model.set_experts_implementation("eager")
    inputs = batch(architectures([name])[0], whole)
    with full_precision():
        expected, got = whole(**inputs), model(**inputs)
        with torch.no_grad():
            assert relative_error(model(**inputs).logits, expected.logits) < LIMIT
        expected.loss.backward()
        got.loss.backward()
    assert relative_error(got.loss, expected.loss) < LIMIT
    grads, state = colrow.full_grads(model), colrow.full_state_dict(model)
    if tp.rank == 0:
        theirs = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
        assert max(gradient_errors(grads, theirs).values()) < 1e-10
        for parameter, value in whole.named_parameters():
            assert torch.equal(state[parameter], value)
    colrow.save_pretrained(model, f"{directory}/again")
    split = sum(p.numel() for p in model.parameters())
    assert split < 0.7 * sum(p.numel() for p in whole.parameters())


# Experts that the files hold one by one; fused Conv1D, tied, without the leading "transformer.".
@pytest.mark.parametrize(("name", "n"), [("mixtral", 2), ("gpt2", 3)])
def test_a_directory_is_read_part_by_part(
    ranks: RankPool, tmp_path: Path, name: str, n: int
) -> None:
    whole_model(name).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if name == "gpt2":
        tensors = {n.removeprefix("transformer."): t.contiguous() for n, t in tensors.items()}
        save_file(tensors, file, {"format": "pt"})
    else:
        assert any("experts.1.w1.weight" in name for name in tensors)
    ranks(n, check_directory, name, str(tmp_path))
    again = load_file(tmp_path / "again" / "model.safetensors")
    again = {n.removeprefix("transformer."): t for n, t in again.items()}
    assert again.keys() == tensors.keys()
    assert all(torch.equal(t, tensors[n].to(t.dtype)) for n, t in again.items())


def check_own(tp: ParallelGroup, path: str, later: bool) -> None:
    whole = OwnModel().double()
    whole.load_state_dict(load_file(path))
    with torch.device("meta"):
        model: nn.Module = OwnModel().double()
    ids = torch.randint(0, 31, (2, 7))
    options = {} if later else {"weights": path}
    colrow.parallelize(model, mesh_of(tp), example_inputs={"ids": ids}, **options)
    assert next(model.parameters()).is_meta == later
    if later:
        colrow.load_weights(model, path)
    expected, got = whole(ids), model(ids)
    assert relative_error(got, expected) < LIMIT
    expected.square().sum().backward()
    got.square().sum().backward()
    grads = colrow.full_grads(model)
    if tp.rank == 0:
        theirs = {n: p.grad for n, p in whole.named_parameters()}
        assert max(relative_error(grads[n], g) for n, g in theirs.items()) < LIMIT


@pytest.mark.parametrize("later", [False, True])
def test_a_model_of_ones_own_on_meta(ranks: RankPool, tmp_path: Path, later: bool) -> None:
    torch.manual_seed(3)
    save_file(OwnModel().double().state_dict(), tmp_path / "own.safetensors")
    ranks(2, check_own, str(tmp_path / "own.safetensors"), later)


class Wide(nn.Module):
    """Weights that are two thin matrices in the copy that is looked at; a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(701, 128)
        self.blocks = nn.ModuleList([Block(128, 600), Block(128, 600)])
        self.head = nn.Linear(128, 701, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


class Block(nn.Module):
    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.mlp(self.norm(x))
        return result


def check_wide(tp: ParallelGroup, path: str) -> None:
    whole = Wide().double()
    with torch.device("meta"):
        model: nn.Module = Wide().double()
    whole.load_state_dict(load_file(path) | {"head.weight": load_file(path)["embedding.weight"]})
    ids = torch.randint(0, 701, (2, 7))
    options: Any = {"weights": path, "example_inputs": {"ids": ids}, "sequence_parallel": True}
    colrow.parallelize(model, mesh_of(tp), **options)
    assert relative_error(model(ids), whole(ids)) < LIMIT
    assert model.get_submodule("head").weight is model.get_submodule("embedding").weight
    assert model.get_parameter("embedding.weight").shape[0] in (350, 351)


def test_large_weights_and_tokens_divided(ranks: RankPool, tmp_path: Path) -> None:
    tensors = Wide().double().state_dict()
    del tensors["head.weight"]
    save_file(tensors, tmp_path / "wide.safetensors")
    ranks(2, check_wide, str(tmp_path / "wide.safetensors"))


class Flat(nn.Module):
    """Its table lies beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(701, 128)
        self.up, self.down = nn.Linear(128, 600), nn.Linear(600, 128)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(self.embedding(ids)).relu())
        return result


def test_large_tables_beside_layers_are_named() -> None:
    with torch.device("meta"):
        model = Flat()
    plan = plan_for(model, 2, example_inputs={"ids": torch.arange(14).view(2, 7)})
    reasons = {row.module: row.why for row in plan.rows}
    assert "embedding.weight is too large to be made up" in reasons["up"]


def alone(model: nn.Module, path: Path) -> nn.Module:
    return colrow.parallelize(model, mesh_of(ParallelGroup.single("tp")), weights=path)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return OwnModel()


def test_one_rank_reads_everything(tmp_path: Path) -> None:
    whole = OwnModel()
    save_file(whole.state_dict(), tmp_path / "own.safetensors")
    model = alone(on_meta(), tmp_path / "own.safetensors")
    assert all(map(torch.equal, model.state_dict().values(), whole.state_dict().values()))


Change = Callable[[dict[str, Tensor]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("both.bias"), r"lacks both\.bias of OwnModel"),
        (lambda t: t.update(other=torch.ones(1)), "has other, for which OwnModel has no place"),
        (lambda t: t.update({"down.bias": torch.ones(3)}), r"down\.bias .* shape \(3,\)"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, change: Change, message: str) -> None:
    tensors = OwnModel().state_dict()
    change(tensors)
    save_file(tensors, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=message):
        alone(on_meta(), tmp_path / "own.safetensors")


def test_tied_parameters_with_two_values(tmp_path: Path) -> None:
    tensors = OwnModel().state_dict()
    save_file(tensors, tmp_path / "own.safetensors")
    model: Any = on_meta()
    model.head.weight = model.embedding.weight
    with pytest.raises(ValueError, match="different values for them: build the model with"):
        alone(model, tmp_path / "own.safetensors")


def test_what_meta_cannot_hold(tmp_path: Path) -> None:
    save_file(OwnModel().state_dict(), tmp_path / "own.safetensors")
    path = tmp_path / "own.safetensors"
    model = on_meta()
    model.register_buffer("scale", torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="the buffer scale of OwnModel is on the meta device"):
        alone(model, path)
    model = on_meta()
    model.slopes = torch.ones(2, device="meta")
    with pytest.raises(ValueError, match="slopes is a tensor on the meta device"):
        alone(model, path)
    model = on_meta()
    model.get_submodule("down").to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"embedding\.weight .* is on the meta device and down"):
        alone(model, path)
    with pytest.raises(ValueError, match="weights are for a model on the meta device"):
        alone(OwnModel(), path)


def read(source: Source, rows: Any, *others: Any) -> Tensor:
    whole = [((0, length),) for length in source.shape]
    part = [given or all_ for given, all_ in zip((rows, *others), whole, strict=False)]
    return source.read([*part, *whole[len(part) :]], torch.float64)


def test_sources_read_any_part(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(4, 6, 5, dtype=torch.float64) for i in range(3)}
    save_file(tensors, tmp_path / "t.safetensors")
    with open_reader(tmp_path / "t.safetensors") as reader:
        stored = tuple(Stored(reader, name) for name in tensors)
        a, b, c = tensors.values()
        rows, columns, last = ((1, 2), (3, 4)), ((0, 1), (2, 5)), ((1, 3), (4, 5))
        assert torch.equal(
            read(stored[0], rows, columns, last), a[[1, 3]][:, [0, 2, 3, 4]][:, :, [1, 2, 4]]
        )
        for dim in range(3):
            joined, whole = Joined(stored, dim), torch.cat([a, b, c], dim)
            part = [None, None, None]
            part[dim] = ((2, 7), (9, 12))  # type: ignore[call-overload]
            index = torch.tensor([2, 3, 4, 5, 6, 9, 10, 11])
            assert joined.shape == whole.shape
            assert torch.equal(read(joined, *part), whole.index_select(dim, index))
        flat = tuple(Cut(s, 0, 1, 4) for s in stored)
        assert torch.equal(read(flat[1], ((0, 1), (2, 3))), b[[1, 3]])
        swapped = Swapped(stored[2], 0, 1)
        assert torch.equal(read(swapped, ((1, 3),), ((0, 2),)), c.transpose(0, 1)[1:3, :2])
    matrices = {f"m{i}": torch.randn(3, 4, dtype=torch.float64) for i in range(3)}
    save_file(matrices, tmp_path / "m.safetensors")
    with open_reader(tmp_path / "m.safetensors") as reader:
        stacked = Stacked(tuple(Stored(reader, name) for name in matrices))
        whole = torch.stack([*matrices.values()])
        assert torch.equal(read(stacked, ((0, 1), (2, 3)), ((1, 3),)), whole[[0, 2], 1:3])


def test_conversions_that_cannot_be_followed_are_named(tmp_path: Path) -> None:
    from transformers.core_model_loading import PermuteForRope, WeightConverter

    model: Any = whole_model("llama")
    model.save_pretrained(tmp_path)
    converter = WeightConverter("q_proj.weight", "q_proj.weight", [PermuteForRope()])
    import transformers.conversion_mapping as table

    before = table.get_model_conversion_mapping
    table.get_model_conversion_mapping = lambda *_: [converter]
    try:
        with open_reader(tmp_path) as reader, pytest.raises(ValueError, match="PermuteForRope"):
            file_names(model, reader)
    finally:
        table.get_model_conversion_mapping = before
