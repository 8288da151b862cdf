"""Small files that state enormous things are refused at once, in little memory, in one line."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import colrow
from colrow.any_model.export import write_training_run
from colrow.any_model.loading import load_trained
from colrow.checkpoint.gguf_file import GGUFTensorReader
from colrow.checkpoint.opening import open_reader
from colrow.checkpoint.pretrained import pretrained_config
from colrow.cli import main
from colrow.generation.tokenizer import load_tokenizer
from colrow.inplace.weights.meta import model_of
from colrow.models.config_limits import check_any_config
from colrow.models.hf_config import config_from_file
from colrow.planner.config_json import model_from_config_json
from colrow.tiny_models.architectures import saved_architecture
from tests.models.tiny import SMALLEST

HUGE = 1 << 62


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(
    *fields: bytes, tensors: bytes = b"", fields_stated: int = -1, tensors_stated: int = 0
) -> bytes:
    count = len(fields) if fields_stated < 0 else fields_stated
    return b"GGUF" + struct.pack("<IQQ", 3, tensors_stated, count) + b"".join(fields) + tensors


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(item: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", item, count) + content


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0, stated: int = -1) -> bytes:
    count = len(dims) if stated < 0 else stated
    return (
        text(name) + struct.pack(f"<I{len(dims)}Q", count, *dims) + struct.pack("<IQ", kind, offset)
    )


def with_data(tensors: bytes, count: int, *fields: bytes, size: int = 128) -> bytes:
    head = gguf(*fields, tensors=tensors, tensors_stated=count)
    return head + bytes(-len(head) % 32) + bytes(size)


NESTED = array(9, 1)
for _ in range(2000):
    NESTED = array(9, 1, NESTED)

GGUF_BOMBS: dict[str, tuple[bytes, str]] = {
    "fields 2**40": (gguf(fields_stated=1 << 40), "states 1099511627776 entries of metadata"),
    "fields that do not fit": (gguf(fields_stated=50) + bytes(100), "states 50 entries"),
    "tensors 2**40": (gguf(tensors_stated=1 << 40), "states 1099511627776 tensors"),
    "tensors that do not fit": (gguf(tensors_stated=2) + bytes(40), "states 2 tensors"),
    "key of 2**62": (gguf(struct.pack("<Q", HUGE) + bytes(50)), "a name of 4611686018427387904"),
    "text of 2**62": (gguf(field("a", 8, struct.pack("<Q", HUGE))), "'a' states a length of 4611"),
    "list of 2**62": (gguf(field("a", 9, array(4, HUGE))), "'a' states 46116860184273879"),
    "texts of 2**62": (gguf(field("a", 9, array(8, HUGE))), "'a' states 46116860184273879"),
    "text in a list": (
        gguf(field("a", 9, array(8, 2, struct.pack("<Q", HUGE) + bytes(50)))),
        "texts of 'a' run past the end",
    ),
    "nested lists": (gguf(field("a", 9, NESTED)), "'a' is a list of lists"),
    "type": (gguf(field("a", 99, bytes(8))), "'a' is of an unknown type 99"),
    "type in a list": (gguf(field("a", 9, array(99, 0)) + bytes(9)), "'a' is of an unknown type"),
    "key twice": (gguf(field("a", 0, b"1"), field("a", 0, b"2")), "the key 'a' twice"),
    "key that is no text": (gguf(struct.pack("<Q", 1) + b"\xff" + bytes(20)), "utf-8"),
    "version": (b"GGUF" + struct.pack("<IQQ", 77, 0, 0), "version 77"),
    "alignment 0": (
        with_data(b"", 0, field("general.alignment", 4, struct.pack("<I", 0))),
        "general.alignment is 0, not a power of two",
    ),
    "alignment 48": (
        with_data(b"", 0, field("general.alignment", 4, struct.pack("<I", 48))),
        "general.alignment is 48, not a power of two",
    ),
    "alignment of another type": (
        with_data(b"", 0, field("general.alignment", 8, text("32"))),
        "general.alignment is of type STRING",
    ),
    "past the end": (with_data(tensor("w", [64]), 1), "'w' of 256 bytes .* does not lie in"),
    "offset 2**62": (with_data(tensor("w", [4], offset=HUGE), 1), "'w' of 16 bytes .* does not"),
    "offset of 1": (with_data(tensor("w", [4], offset=1), 1), "not at a multiple of 32"),
    "overflow": (with_data(tensor("w", [1 << 32, 1 << 32]), 1), "too large"),
    "overflow to nothing": (with_data(tensor("w", [1 << 63, 2]), 1), "too large"),
    "half a block": (with_data(tensor("w", [33], kind=2), 1), "Q4_0's blocks of 32"),
    "dimensions 2**32": (
        with_data(tensor("w", [4], stated=(1 << 32) - 1), 1),
        "'w' states 4294967295 dimensions",
    ),
    "tensor type": (with_data(tensor("w", [4], kind=999), 1), "'w' is of an unknown type 999"),
    "tensor twice": (with_data(tensor("w", [4]) * 2, 2), "the tensor 'w' twice"),
    "overlap": (with_data(tensor("w", [16]) + tensor("v", [4], offset=32), 2), "'w' and 'v' over"),
}


@pytest.mark.parametrize("name", GGUF_BOMBS)
def test_a_gguf_file_that_states_what_is_not_there(name: str, tmp_path: Path) -> None:
    content, message = GGUF_BOMBS[name]
    path = tmp_path / "bomb.gguf"
    path.write_bytes(content)
    for read in (open_reader, load_tokenizer, colrow.from_pretrained):
        with pytest.raises(ValueError, match=f"bomb.gguf is not a complete GGUF file .*{message}"):
            read(path)


def numbered(key: str, value: bytes) -> bytes:
    """A file of a llama without tensors, with another number under one key."""
    fields = {
        name: struct.pack("<II", 4, size)
        for name, size in (
            ("embedding_length", 8),
            ("block_count", 1),
            ("attention.head_count", 2),
            ("feed_forward_length", 12),
            ("context_length", 16),
        )
    }
    fields["attention.layer_norm_rms_epsilon"] = struct.pack("<If", 6, 1e-5)
    fields[key] = value
    written = (text(f"llama.{name}") + number for name, number in fields.items())
    return gguf(field("general.architecture", 8, text("llama")), *written)


def uint64(value: int) -> bytes:
    return struct.pack("<IQ", 10, value)


def float32(value: float) -> bytes:
    return struct.pack("<If", 6, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", uint64(10**9)),
        ("block_count", uint64(0)),
        ("block_count", float32(1.0)),
        ("block_count", float32(float("nan"))),
        ("block_count", struct.pack("<IB", 7, 1)),
        ("attention.head_count", uint64(0)),
        ("attention.head_count", uint64(10**9)),
        ("attention.head_count", struct.pack("<I", 9) + array(5, 1, b"\xff" * 4)),
        ("attention.head_count_kv", uint64(0)),
        ("attention.key_length", uint64(10**9)),
        ("attention.sliding_window", uint64(1 << 63)),
        ("embedding_length", uint64(1 << 63)),
        ("embedding_length", float32(float("inf"))),
        ("embedding_length", struct.pack("<I", 8) + text("8")),
        ("feed_forward_length", uint64(10**15)),
        ("context_length", uint64(1 << 62)),
        ("attention.layer_norm_rms_epsilon", float32(float("nan"))),
        ("rope.freq_base", float32(float("inf"))),
        ("rope.freq_base", float32(-1.0)),
        ("rope.scaling.factor", float32(float("nan"))),
    ],
    ids=str,
)
def test_numbers_of_a_gguf_file(key: str, value: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bomb.gguf"
    path.write_bytes(numbered(key, value))
    for read in (colrow.from_pretrained, pretrained_config):
        with pytest.raises(ValueError, match=rf"bomb.gguf \(GGUF\): llama.{key}=.*: must be"):
            read(path)


def test_a_gguf_file_with_everything_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = tensor("w", [8]) + tensor("v", [3, 2], offset=32) + tensor("empty", [0], offset=64)
    fields = (
        field("general.alignment", 4, struct.pack("<I", 32)),
        field("bad", 8, struct.pack("<Q", 1) + b"\xff"),
        field("bytes", 9, array(0, 3, b"\1\2\3")),
    )
    path.write_bytes(with_data(tensors, 3, *fields, size=64))
    with GGUFTensorReader(path) as reader:
        assert reader.shape("v") == (2, 3)
        assert reader.read("w", dtype=torch.float32).tolist() == [0.0] * 8
        assert reader.read("empty", dtype=torch.float32).shape == (0,)
        assert reader.metadata_value("bytes") == [1, 2, 3]
        with pytest.raises(ValueError, match="'bad' is not UTF-8"):
            reader.metadata_value("bad")


def header(content: object, length: int | None = None, data: int = 16) -> bytes:
    written = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(written) if length is None else length) + written + bytes(data)


def entry(shape: list[int], first: int, last: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    "content",
    [
        header({}, 1 << 63),
        header({}, (1 << 24) + 1),
        header({}, 1 << 20),
        header({"w": entry([4], 0, 16), "v": entry([4], 0, 16)}),
        header({"w": entry([4], 0, 16), "v": entry([2], 8, 16)}),
        header({"w": entry([400], 0, 1600)}),
        header({"w": entry([4], 0, 8)}),
        header({"w": entry([1 << 62, 4], 0, 16)}),
        header({"w": entry([-4], 0, 16)}),
        header({"w": entry([4], 16, 0)}),
        header({"w": entry([4], 0, 16, "F99")}),
        header(b'{"w":' + b"[" * 100_000),
        header(b"\xff" * 100),
    ],
    ids=lambda content: str(content[:40]),
)
def test_a_safetensors_file_that_states_what_is_not_there(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is not a complete safetensors file"):
        open_reader(path)
    path.write_bytes(header({"w": entry([4], 0, 16)}))
    open_reader(path).close()


NAN, INF = float("nan"), float("inf")
CONFIG_BOMBS: list[tuple[dict[str, Any], str]] = [
    *(
        ({key: value}, f"{key}=.*: must be")
        for key in SMALLEST
        if key != "model_type"
        for value in (10**13, 10**35, 0, -1, True, 4.0, "4", [4], {"a": 4}, NAN)
    ),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be at most 4096"),
    ({"num_attention_heads": 10**9}, "num_attention_heads=1000000000: must be at most 65536"),
    ({"num_key_value_heads": 10**9}, "num_key_value_heads=1000000000: must be at most 65536"),
    ({"hidden_size": 10**9}, "hidden_size=1000000000: must be at most"),
    ({"head_dim": 10**9}, "head_dim=1000000000: must be at most 65536"),
    ({"head_dim": True}, "head_dim=True: must be a whole number"),
    (
        {
            "hidden_size": 1 << 22,
            "num_attention_heads": 1024,
            "num_hidden_layers": 4096,
            "intermediate_size": 1 << 24,
        },
        "more than .* parameters",
    ),
    *(
        ({key: value}, f"{key}=.*: must be")
        for key in ("rms_norm_eps", "rope_theta", "attention_dropout", "initializer_range")
        for value in (NAN, INF, -INF, -1.0, "1", True, [1])
    ),
    ({"rope_theta": 0}, "rope_theta=0: must be above 0"),
    ({"partial_rotary_factor": 0}, "partial_rotary_factor=0: must be above 0"),
    (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 16,
            }
        },
        "low_freq_factor=4.0 is above high_freq_factor=1.0",
    ),
    ({"attention_dropout": 1.5}, "attention_dropout=1.5: must be finite, at least 0 and at most 1"),
    *(
        ({"rope_scaling": {"rope_type": "linear", "factor": value}}, "factor=.*: must be")
        for value in (NAN, INF, 0, -2, "2", True)
    ),
    (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": NAN}},
        "low_freq_factor=nan",
    ),
    ({"rope_scaling": [1]}, "must be a table"),
    ({"partial_rotary_factor": INF}, "partial_rotary_factor=inf: must be finite"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes': must be true or false"),
    ({"attention_bias": 1}, "attention_bias=1: must be true or false"),
    ({"eos_token_id": "</s>"}, "eos_token_id.*must be a whole number"),
    ({"eos_token_id": list(range(20_000))}, "has 20000 items"),
    ({"bos_token_id": 1.5}, "bos_token_id=1.5: must be a whole number"),
    ({"pad_token_id": 10**30}, "pad_token_id=1000000000000000000000000000000: must be at most"),
    ({"model_type": ["llama"]}, "model_type=..llama.., not a name"),
    ({"model_type": "x" * 100_000}, "unknown architecture 'xxx"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_BOMBS, ids=repr)
def test_a_configuration_with_numbers_that_no_model_has(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALLEST, **change}))
    with pytest.raises(ValueError, match=rf"config.json: .*{message}") as caught:
        config_from_file(tmp_path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2", "sliding_window": "4"}, "sliding_window='4': must be a whole"),
        ({"model_type": "mistral", "sliding_window": 10**14}, "sliding_window=.*must be at most"),
        ({"model_type": "qwen2", "use_sliding_window": 1}, "use_sliding_window=1: must be true"),
        ({"model_type": "qwen3", "layer_types": [1]}, "layer_types=.1.: must be a list of names"),
        ({"model_type": "gpt_neox", "rotary_pct": NAN}, "rotary_pct=nan: must be finite"),
        ({"model_type": "gpt_neox", "rotary_pct": 0.0}, "rotary_pct=0.0: must be above 0"),
    ],
    ids=repr,
)
def test_keys_of_other_families(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALLEST, **change}))
    with pytest.raises(ValueError, match=message):
        config_from_file(tmp_path)


# what fits no memory, or not the weights beside it


def change(directory: Path, values: dict[str, Any]) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 4000}, "4000 layers"),
        ({"num_hidden_layers": 3}, "lacks .*model.layers.2"),
        ({"num_hidden_layers": 1}, "beyond what a llama model"),
        ({"hidden_size": 1 << 18, "intermediate_size": 1 << 20}, r"has shape \(256, 32\)"),
        ({"vocab_size": 1 << 25}, r"asks for \(33554432, 32\)"),
    ],
    ids=repr,
)
def test_the_tensors_are_compared_before_there_is_a_model(
    values: dict[str, Any], message: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(model, values)

    def built(*args: object, **options: object) -> None:
        raise AssertionError("a model is being built")

    monkeypatch.setattr("colrow.checkpoint.pretrained.Decoder", built)
    for read in (colrow.from_pretrained, pretrained_config):
        with pytest.raises(ValueError, match=message):
            read(model)


IN_PLACE = [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be at most 4096"),
    ({"num_hidden_layers": 4000}, "4000 layers, and its weights have 21 tensors"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True: must be a whole number"),
    ({"vocab_size": 10**12}, "vocab_size=1000000000000: must be at most"),
    ({"intermediate_size": -5}, "intermediate_size=-5: must be at least -1"),
    ({"intermediate_size": -1}, "transformers cannot make such a model"),
    ({"num_attention_heads": 0}, "config.json: "),
    ({"hidden_size": 1 << 20}, "has shape .* but the configuration asks for"),
    ({"rms_norm_eps": NAN}, "rms_norm_eps=nan: must be finite"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": INF}}, "rope_theta=inf: must be"),
    ({"text_config": {"num_layers": 10**9}}, "num_layers=1000000000: must be at most 4096"),
]


@pytest.mark.parametrize(("values", "message"), IN_PLACE, ids=repr)
def test_models_in_place(values: dict[str, Any], message: str, model: Path) -> None:
    change(model, values)
    for read in (lambda: colrow.plan_for(str(model), 2), lambda: saved_architecture(model)):
        with pytest.raises(ValueError, match=message):
            read()


@pytest.mark.parametrize(
    "named", [[1], [["x"]], [None], [], "abc", {"a": 1}, ["pipeline"], ["AutoModel"], ["x\ny"]]
)
def test_a_class_that_is_no_model(named: Any, model: Path) -> None:
    change(model, {"architectures": named})
    with pytest.raises(ValueError, match=r"is a model of class .*, which transformers lacks"):
        model_of(model, None)


@pytest.mark.parametrize("text", ["[]", "5", "null", '{"watermarking_config": 5}'])
def test_a_generation_configuration_that_makes_no_sense(text: str, model: Path) -> None:
    (model / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        model_of(model, None)


def test_any_number_can_be_one_of_modules(model: Path) -> None:
    """Experts, codebooks, labels: what has far more parameters than its file tensors."""
    experts = {
        "model_type": "switch_transformers",
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        **{"num_experts": 10**7, "num_layers": 2, "num_sparse_encoder_layers": 1, "d_kv": 4},
        **{"d_model": 8, "d_ff": 8, "num_heads": 2, "expert_capacity": 4},
    }
    change(model, experts)
    with pytest.raises(ValueError, match=r"more than 10336 parameters, and its weights are 21 "):
        model_of(model, None)
    change(model, {"num_experts": 4})
    assert sum(1 for _ in model_of(model, None).parameters()) > 21


def test_configurations_in_place_that_are_right() -> None:
    check_any_config(
        {
            "time_step_limit": [0.0, INF],
            "max_length": 10**30,
            "output_hidden_states": True,
            "window_size": -1,
            "vision_feature_layer": -2,  # of LLaVA, counted from the last
            "vision_feature_layers": [-2, -5, -8, -11, 6],
            "num_hidden_layers": 512,
            "vocab_size": 1_000_000,
        }
    )


def test_a_model_that_no_memory_holds() -> None:
    large = {
        **SMALLEST,
        "hidden_size": 1 << 16,
        "intermediate_size": 1 << 20,
        "num_hidden_layers": 99,
    }
    with pytest.raises(ValueError, match=r"take \d+ GB on each of 1 ranks, and this machine has"):
        colrow.from_config(large)
    assert colrow.from_config(large, device="meta").config.num_layers == 99


def test_an_export_compares_with_the_checkpoint(tmp_path: Path) -> None:
    layer = colrow.from_config(SMALLEST)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "config.json").write_text(json.dumps(SMALLEST))
    write_training_run(layer, tmp_path / "run", tmp_path / "files")
    assert load_trained(tmp_path / "run")[1] == 0
    for values in ({"intermediate_size": 1 << 20}, {"num_hidden_layers": 2}):
        (tmp_path / "run" / "model" / "config.json").write_text(json.dumps({**SMALLEST, **values}))
        with pytest.raises(ValueError, match=r"has shape .* in .*step-00000000.*asks for"):
            load_trained(tmp_path / "run")


def test_planning_for_models_that_fit_nowhere(tmp_path: Path) -> None:
    """A trillion parameters in 512 layers, and a vocabulary of a million."""
    huge = {
        **SMALLEST,
        "vocab_size": 1_000_000,
        "hidden_size": 12_288,
        "intermediate_size": 49_152,
        "num_hidden_layers": 512,
        "num_attention_heads": 96,
        "max_position_embeddings": 1 << 20,
    }
    (tmp_path / "config.json").write_text(json.dumps(huge))
    shape = model_from_config_json(tmp_path)
    assert shape.parameters > 1e12
    assert main(["plan", str(tmp_path), "--gpus", "4096", "--gpu", "h100"]) in (0, 1)


MEASURE = """
import contextlib, io, json, resource, sys, time
import torch, transformers
from colrow.cli import main

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

commands = json.loads(sys.argv[1])
for words in commands[:2] * 2:  # what is imported only once
    with contextlib.redirect_stderr(io.StringIO()):
        main(words)
for words in commands:
    before, started, said = peak(), time.process_time(), io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(words)
    print(json.dumps([code, time.process_time() - started, peak() - before, said.getvalue()]))
"""


def test_bombs_cost_neither_time_nor_memory(model: Path, tmp_path: Path) -> None:
    bombs = []
    for number, text in enumerate(
        (
            json.dumps({**SMALLEST, "num_hidden_layers": 10**9}),
            json.dumps(SMALLEST)[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
            json.dumps(SMALLEST)[:-1] + ', "x": ' + "9" * 1_000_000 + "}",
            json.dumps(SMALLEST)[:-1] + ', "x": [' + "[]," * 1_000_000 + "1]}",
        )
    ):
        directory = Path(shutil.copytree(model, tmp_path / str(number)))
        (directory / "config.json").write_text(text)
        bombs.append(str(directory))
    for name in ("nested lists", "text of 2**62", "fields 2**40", "overflow"):
        (tmp_path / f"{name}.gguf").write_bytes(GGUF_BOMBS[name][0])
        bombs.append(str(tmp_path / f"{name}.gguf"))
    commands = [
        [*words.split()[:1], bomb, *words.split()[1:]]
        for bomb in bombs
        for words in ("generate hi --tp 2", "verify --tp 2", "comms --tp 2", "bench --tp 2")
    ]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(commands)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    measured = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(measured) == len(commands)
    for words, (code, seconds, megabytes, said) in zip(commands, measured, strict=True):
        assert code == 2, (words, said)
        assert seconds < 1 and megabytes < 100, (words, seconds, megabytes)
        assert len(said.strip().splitlines()) == 1 and len(said) < 600, (words, said)
        assert "Traceback" not in said and words[1] in said, (words, said)
