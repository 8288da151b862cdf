"""Every slice that the readers give equals the same slice of the whole tensor, read elsewhere."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from colrow.checkpoint import gguf_file
from colrow.checkpoint.gguf_file import GGUFTensorReader
from colrow.checkpoint.locate import find_weights, resolve_model_path
from colrow.checkpoint.opening import open_reader
from colrow.checkpoint.reader import Ranges, TensorReader

ROWS, COLUMNS = 37, 768  # three of the largest blocks (256) in a row

SELECTIONS: list[tuple[Ranges | None, Ranges | None]] = [
    (None, None),
    (((5, 19),), None),
    (((0, 3), (9, 9), (10, 11), (30, 37)), None),
    (((20, 25), (1, 4)), None),
    (None, ((256, 512),)),
    (None, ((5, 37), (70, 71), (255, 300), (767, 768))),
    (None, ((0, 1), (1, 2), (32, 64))),
    (((2, 8), (36, 37)), ((31, 33), (500, 700))),
    ((), None),
    (None, ()),
    (((4, 4),), ((3, 700),)),
]
QUANTIZED = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.BF16, Kind.F16, Kind.F32]
RANDOM_BLOCKS = [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ2_XS, Kind.IQ4_XS]


def pick(
    whole: torch.Tensor, rows: Ranges | None = None, columns: Ranges | None = None
) -> torch.Tensor:
    for dimension, ranges in enumerate((rows, columns)):
        if ranges is not None:
            wanted = [i for start, stop in ranges for i in range(start, stop)]
            whole = whole.index_select(dimension, torch.tensor(wanted, dtype=torch.long))
    return whole


def assert_owned(result: torch.Tensor) -> None:
    assert result.is_contiguous()
    assert result.untyped_storage().nbytes() == result.numel() * result.element_size()
    assert result.device.type == "cpu"


def check_slices(reader: TensorReader, name: str, whole: torch.Tensor) -> None:
    assert reader.shape(name) == tuple(whole.shape)
    for rows, columns in SELECTIONS:
        for dtype in (torch.float32, torch.float64):
            got = reader.read(name, rows, columns, dtype=dtype)
            assert got.dtype == dtype
            assert torch.equal(got, pick(whole, rows, columns).to(dtype)), (rows, columns)
            assert_owned(got)


# safetensors


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "fp64": normal(ROWS, COLUMNS).double(),
        "fp32": normal(ROWS, COLUMNS),
        "fp16": normal(ROWS, COLUMNS).half(),
        "bf16": normal(ROWS, COLUMNS).bfloat16(),
        "vector": normal(COLUMNS).bfloat16(),
        "experts": normal(4, 6, 5),
        "scalar": torch.tensor(3.5),
        "mask": torch.arange(12).reshape(3, 4),
        "fp8": torch.ones(4, 4, dtype=torch.float8_e4m3fn),
    }


@pytest.fixture(scope="module")
def single(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def sharded(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    weight_map: dict[str, str] = {}
    for number, name in enumerate(("fp32", "bf16", "vector"), start=1):
        shard = f"model-{number:05}-of-00003.safetensors"
        save_file({name: tensors[name]}, tmp_path / shard)
        weight_map[name] = shard
    write_index(tmp_path, weight_map)
    return tmp_path


def write_index(directory: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("name", ["fp64", "fp32", "fp16", "bf16"])
def test_safetensors_slices(single: Path, name: str) -> None:
    with open_reader(single) as reader:
        check_slices(reader, name, load_file(single)[name])


def test_safetensors_other_ranks_and_types(single: Path, tensors: dict[str, torch.Tensor]) -> None:
    whole = load_file(single)
    with open_reader(single.parent) as reader:
        assert reader.names() == frozenset(tensors)
        assert str(single) in reader.description
        assert "safetensors" in reader.description
        rows = ((1, 3), (700, 768))
        vector = reader.read("vector", rows, dtype=torch.float32)
        assert torch.equal(vector, pick(whole["vector"], rows).float())
        experts = reader.read("experts", ((3, 4), (0, 2)), ((1, 3), (5, 6)), dtype=torch.float32)
        assert torch.equal(experts, pick(whole["experts"], ((3, 4), (0, 2)), ((1, 3), (5, 6))))
        assert reader.read("scalar", dtype=torch.float64).item() == 3.5
        assert torch.equal(reader.read("mask", ((1, 3),), dtype=torch.int64), whole["mask"][1:])
        narrowed = reader.read("fp32", dtype=torch.bfloat16)
        assert torch.equal(narrowed, whole["fp32"].bfloat16())
    assert_owned(vector)
    assert torch.equal(vector, pick(whole["vector"], rows).float())


def test_sharded_index(sharded: Path, tensors: dict[str, torch.Tensor]) -> None:
    with open_reader(sharded) as reader:
        assert reader.names() == {"fp32", "bf16", "vector"}
        assert "3 shards" in reader.description
        for name in ("fp32", "bf16"):
            check_slices(reader, name, tensors[name])


# GGUF


def write_gguf(
    path: Path,
    tensors: dict[str, tuple[npt.NDArray[Any], Kind | None]],
    fields: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    fields(writer)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(rows: int, columns: int, kind: Kind) -> npt.NDArray[np.uint8]:
    """Bytes below 0x7c, so that every fp16 scale among them is finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(int(kind))
    return generator.integers(0, 0x7C, (rows, columns // block * size), dtype=np.uint8)


def normal(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.fixture(params=[None, 256], ids=["chunk=default", "chunk=256"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also with chunks smaller than a row."""
    if request.param:
        monkeypatch.setattr(gguf_file, "_CHUNK_ELEMENTS", request.param)
    yield


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("kind", QUANTIZED + RANDOM_BLOCKS, ids=lambda kind: kind.name)
def test_gguf_slices(kind: Kind, tmp_path: Path) -> None:
    if kind in QUANTIZED:
        data = gguf.quants.quantize(normal(ROWS, COLUMNS), kind)
    else:
        data = random_blocks(ROWS, COLUMNS, kind)
    path = write_gguf(tmp_path / "m.gguf", {"w": (data, kind)})
    whole = torch.from_numpy(np.array(gguf.quants.dequantize(data, kind)))
    assert whole.shape == (ROWS, COLUMNS)
    assert whole.isfinite().all()
    assert whole.std() > 0
    with open_reader(path) as reader:
        check_slices(reader, "w", whole)
        bf16 = reader.read("w", ((3, 9),), dtype=torch.bfloat16)
    assert torch.equal(bf16, whole[3:9].bfloat16())


@pytest.mark.usefixtures("chunks")
def test_gguf_other_ranks_and_types(tmp_path: Path) -> None:
    vector, experts = normal(512), normal(4, 6, 64)
    double, integers = normal(5, 7).astype(np.float64) / 3, np.arange(6, dtype=np.int32)
    quantized = gguf.quants.quantize(experts, Kind.Q4_0)
    path = write_gguf(
        tmp_path / "m.gguf",
        {
            "vector": (vector, None),
            "q_vector": (gguf.quants.quantize(vector[None], Kind.Q8_0)[0], Kind.Q8_0),
            "experts": (quantized, Kind.Q4_0),
            "double": (double, None),
            "integers": (integers, None),
        },
    )
    rows: Ranges = ((7, 40), (0, 1), (300, 512))
    with open_reader(path) as reader:
        assert reader.names() == {"vector", "q_vector", "experts", "double", "integers"}
        assert "GGUF" in reader.description
        got = reader.read("vector", rows, dtype=torch.float32)
        assert torch.equal(got, pick(torch.from_numpy(vector), rows))
        q_vector = gguf.quants.dequantize(gguf.quants.quantize(vector[None], Kind.Q8_0), Kind.Q8_0)
        got_q = reader.read("q_vector", rows, dtype=torch.float32)
        assert torch.equal(got_q, pick(torch.from_numpy(q_vector)[0], rows))
        assert reader.shape("experts") == (4, 6, 64)
        whole = torch.from_numpy(gguf.quants.dequantize(quantized, Kind.Q4_0))
        sliced = reader.read("experts", ((3, 4), (0, 2)), ((1, 3), (5, 6)), dtype=torch.float32)
        assert torch.equal(sliced, pick(whole, ((3, 4), (0, 2)), ((1, 3), (5, 6))))
        got_double = reader.read("double", ((1, 4),), ((2, 7),), dtype=torch.float64)
        assert torch.equal(got_double, torch.from_numpy(double)[1:4, 2:])
        assert reader.read("integers", ((4, 6),), dtype=torch.int64).tolist() == [4, 5]
    assert torch.equal(got, pick(torch.from_numpy(vector), rows))


def test_gguf_metadata(tmp_path: Path) -> None:
    tokens = ["<s>", "", "Ġhéllo", "日本"] + [f"t{i}" for i in range(1000)]

    def fields(writer: gguf.GGUFWriter) -> None:
        writer.add_uint32("llama.block_count", 30)
        writer.add_float32("llama.rope.freq_base", 10000.0)
        writer.add_bool("tokenizer.ggml.add_bos_token", False)
        writer.add_array("tokenizer.ggml.tokens", tokens)
        writer.add_array("tokenizer.ggml.token_type", list(range(len(tokens))))
        writer.add_array("one", ["alone"])
        writer.add_array("flags", [True, False])
        writer.add_string("tokenizer.chat_template", "{{ übung }}")

    path = write_gguf(tmp_path / "m.gguf", {"w": (normal(2, 2), None)}, fields)
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 30,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": list(range(len(tokens))),
        "one": ["alone"],
        "flags": [True, False],
        "tokenizer.chat_template": "{{ übung }}",
    }
    with GGUFTensorReader(path) as reader:
        assert reader.metadata() == expected
        for key, value in expected.items():
            assert reader.metadata_value(key) == value
        assert reader.metadata_value("absent") is None
        assert reader.metadata_value("absent", 7) == 7


def test_gguf_unsupported_type(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"w": (random_blocks(2, 64, Kind.Q8_1), Kind.Q8_1)})
    with open_reader(path) as reader:
        assert reader.shape("w") == (2, 64)
        with pytest.raises(ValueError, match=r"'w'.*Q8_1.*supported: F32, F16, Q4_0.*Q6_K"):
            reader.read("w", dtype=torch.float32)


def test_gguf_part_of_a_split_model(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf",
        {"w": (normal(2, 2), None)},
        lambda writer: writer.add_uint16("split.count", 3),
    )
    with pytest.raises(ValueError, match=r"one of 3 parts.*--merge"):
        open_reader(path)


# what the user can get wrong


@pytest.fixture(params=["safetensors", "gguf"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file with tensors ``layer.weight`` [4, 32] and ``layer.bias`` [4]."""
    weight, bias = normal(4, 32), normal(4)
    path = tmp_path / f"small.{request.param}"
    if request.param == "gguf":
        return write_gguf(path, {"layer.weight": (weight, None), "layer.bias": (bias, None)})
    save_file(
        {"layer.weight": torch.from_numpy(weight), "layer.bias": torch.from_numpy(bias)}, path
    )
    return path


def test_bad_arguments(small: Path) -> None:
    with open_reader(small) as reader:
        with pytest.raises(ValueError, match=r"no tensor 'layer.wieght'; did you mean 'layer.w"):
            reader.shape("layer.wieght")
        with pytest.raises(ValueError, match=r"no tensor 'zzz'$"):
            reader.read("zzz", dtype=torch.float32)
        for bad in ((0, 5), (-1, 2), (3, 2)):
            with pytest.raises(ValueError, match=r"rows.*'layer.weight'.*\[4, 32\].*<= 4"):
                reader.read("layer.weight", (bad,), dtype=torch.float32)
        with pytest.raises(ValueError, match=r"columns \(0, 33\).*<= 32"):
            reader.read("layer.weight", None, ((0, 33),), dtype=torch.float32)
        with pytest.raises(ValueError, match=r"\[4\], so it has no columns"):
            reader.read("layer.bias", None, ((0, 1),), dtype=torch.float32)
        with pytest.raises(ValueError, match=r"F32.*torch.int64.*fractions"):
            reader.read("layer.weight", dtype=torch.int64)
    with pytest.raises(ValueError, match="was closed"):
        reader.read("layer.weight", dtype=torch.float32)
    reader.close()


@pytest.mark.parametrize("keep", [0, 5, 60, -200], ids=lambda keep: f"keep={keep}")
def test_truncated_file(small: Path, keep: int) -> None:
    small.write_bytes(small.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"small.*not a complete (safetensors|GGUF) file"):
        open_reader(small)


def test_damaged_file(small: Path) -> None:
    small.write_bytes(b"\xff" * 300)
    with pytest.raises(ValueError, match=r"not a complete.*download it again"):
        open_reader(small)
    small.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        open_reader(small)


def test_gguf_of_the_other_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(ValueError, match="other byte order"):
        open_reader(path)


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "colrow.checkpoint.gguf_file")
    with pytest.raises(ValueError, match=r"needs the package gguf: pip install 'colrow\[models\]'"):
        open_reader(path)


def test_safetensors_unsupported_type(single: Path) -> None:
    with (
        open_reader(single) as reader,
        pytest.raises(ValueError, match=r"'fp8'.*F8_E4M3.*supported: F64, F32"),
    ):
        reader.read("fp8", dtype=torch.float32)


def test_index_that_contradicts_its_shards(sharded: Path) -> None:
    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(sharded, {**weight_map, "extra": weight_map["fp32"]})
    with pytest.raises(ValueError, match=r"'extra' in model-00001-of-00003.*does not hold it"):
        open_reader(sharded)
    write_index(sharded, weight_map)
    (sharded / weight_map["bf16"]).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors, which is missing"):
        open_reader(sharded)
    write_index(sharded, ["fp32"])
    with pytest.raises(ValueError, match="no 'weight_map'"):
        open_reader(sharded)
    (sharded / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="not a complete JSON file"):
        open_reader(sharded)


# where the weights are


def test_missing_path(tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    with pytest.raises(ValueError, match=rf"{missing}'\. Accepted: .*\.gguf file"):
        open_reader(missing)


def test_hub_id_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    save_file({"w": torch.ones(2, 3)}, snapshot / "model.safetensors")
    assert resolve_model_path("someone/tiny") == snapshot
    with open_reader("someone/tiny") as reader:
        assert reader.shape("w") == (2, 3)
    with pytest.raises(ValueError, match=r"no file or directory .*, and no snapshot of 'a/b'"):
        resolve_model_path("a/b")
    with pytest.raises(ValueError, match=r"no file or directory '[^']*'\. Accepted"):
        resolve_model_path("a/b.gguf")


def test_directory_without_readable_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no weights\. Accepted"):
        find_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"only pytorch_model.bin.*any code.*save_pretrained"):
        find_weights(tmp_path)
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle"):
        find_weights(tmp_path / "pytorch_model.bin")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"but other.gguf; give the path of the file itself"):
        find_weights(tmp_path)
    with pytest.raises(ValueError, match=r"config.json is not a weight file"):
        find_weights(tmp_path / "config.json")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert find_weights(tmp_path).name == "model.safetensors.index.json"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_weights(tmp_path).name == "model.safetensors"


# memory

MEASURE = """
import sys
import torch
from colrow.checkpoint.opening import open_reader

def status():
    with open("/proc/self/status") as file:
        pairs = (line.split(":") for line in file)
        return {key: int(value.split()[0]) for key, value in pairs if key in KEYS}

KEYS = ("VmHWM", "VmRSS", "RssFile", "RssAnon")
for path, rows, columns in eval(sys.argv[1]):
    with open_reader(path) as reader:
        reader.read("w", ((0, 1),), dtype=torch.float32)  # what is imported or built only once
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak so far
        before = status()
        result = reader.read("w", rows, columns, dtype=torch.float32)
        after = status()
    file_pages = max(0, after["RssFile"] - before["RssFile"])
    peak = after["VmHWM"] - before["VmRSS"] - file_pages
    print(result.numel() * 4 // 1024, peak, after["RssAnon"] - before["RssAnon"])
    del result
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_slice_allocates_little_more_than_itself(tmp_path: Path) -> None:
    rows, columns = 8192, 4096  # 128 MiB as float32
    files = {name: tmp_path / f"big.{name}" for name in ("safetensors", "gguf")}
    save_file({"w": torch.ones(rows, columns)}, files["safetensors"])
    write_gguf(files["gguf"], {"w": (random_blocks(rows, columns, Kind.Q6_K), Kind.Q6_K)})
    tenth_of_rows = ((0, 300), (7000, 7519))
    tenth_of_columns = tuple((start, start + 26) for start in range(1, 4095, 256))
    one_column = ((1000, 1001),)
    cases: list[tuple[str, Ranges | None, Ranges | None]] = [
        (str(path), *selection)
        for path in files.values()
        for selection in ((None, one_column), (tenth_of_rows, None), (None, tenth_of_columns))
    ]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, repr(cases)], capture_output=True, text=True, check=False
    )
    if "clear_refs" in run.stderr:
        pytest.skip("the kernel does not let a process reset its peak")
    assert run.returncode == 0, run.stderr
    measured = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    assert len(measured) == len(cases)
    for case, (result_kib, peak_kib, kept_kib) in zip(cases, measured, strict=True):
        assert result_kib < 0.11 * rows * columns * 4 / 1024
        assert peak_kib < result_kib + 6 * 1024, case[0]
        assert kept_kib < result_kib + 6 * 1024, case[0]
