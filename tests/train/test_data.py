"""From files to sequences: every format, packing, the order that no layout changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from colrow.train.batches import IGNORED, Order, Windows
from colrow.train.documents import documents
from colrow.train.tokenize import prepare_tokens
from colrow.train.tokens import Encoded, TokenFile, write_tokens

ROWS = [{"text": "first"}, {"prompt": "ask", "completion": "tell"}, {"text": "third é"}]
# What the rows are as bytes, with 256 at the end of each; and which of them count.
IDS = [*b"first", 256, *b"asktell", 256, *"third é".encode(), 256]
COUNTED = [True] * 6 + [False] * 3 + [True] * 5 + [True] * 9


def write(path: Path) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS_WITH_ALL_FIELDS), path)
    else:
        from datasets import Dataset

        Dataset.from_list(ROWS_WITH_ALL_FIELDS).save_to_disk(str(path))


ROWS_WITH_ALL_FIELDS = [{"text": None, "prompt": None, "completion": None, **row} for row in ROWS]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "dataset"])
def test_every_format_gives_the_same_tokens(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    done: list[tuple[int, int]] = []
    tokens = prepare_tokens(
        tmp_path / name,
        "bytes",
        tmp_path / "cache",
        vocab_size=257,
        progress=lambda *numbers: done.append(numbers),
    )
    assert tokens.ids.tolist() == IDS
    assert tokens.counted is not None
    assert tokens.counted.tolist() == COUNTED
    assert tokens.ids.dtype == np.uint16
    if name != "dataset":
        assert done[-1][0] == done[-1][1] == (tmp_path / name).stat().st_size


def test_a_directory_is_its_files_in_order_and_a_long_text_is_one_document(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    line = "0123456789" * 10 + "\n"
    (texts / "b.txt").write_text(line * 25_000)  # more than is read at a time
    (texts / "a.md").write_text("before")
    (texts / "ignored.bin").write_bytes(b"\xff")
    parts = list(documents(texts))
    assert parts[0].completion == "before"
    assert "".join(part.completion for part in parts[1:]) == line * 25_000
    assert len(parts) > 2
    assert [part.ends for part in parts] == [True, *[False] * (len(parts) - 2), True]
    tokens = prepare_tokens(texts, "bytes", tmp_path / "cache", vocab_size=257)
    assert np.flatnonzero(np.asarray(tokens.ids) == 256).tolist() == [6, len(tokens) - 1]


def test_tokens_are_made_once(tmp_path: Path) -> None:
    text, cache = tmp_path / "a.txt", tmp_path / "cache"
    text.write_text("some text")
    first = prepare_tokens(text, "bytes", cache, vocab_size=257)
    before = (first.path / "tokens.bin").stat().st_mtime_ns
    again = prepare_tokens(text, "bytes", cache, vocab_size=257)
    assert (again.path / "tokens.bin").stat().st_mtime_ns == before
    text.write_text("some other text")
    assert prepare_tokens(text, "bytes", cache, vocab_size=257).path != first.path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"te', r"a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', r'line 1 has neither a "text" nor'),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("a.pkl", b"", "is not one of"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare_tokens(tmp_path / name, "bytes", tmp_path / "cache", vocab_size=257)
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


def test_tokens_outside_the_vocabulary_and_cut_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the tokenizer gave token 9, but the model's vocabulary"):
        write_tokens(tmp_path / "t", [Encoded([1, 9])], vocab_size=9)
    with pytest.raises(ValueError, match="the text is empty"):
        write_tokens(tmp_path / "t", [Encoded([])], vocab_size=9)
    assert list(tmp_path.iterdir()) == []
    write_tokens(tmp_path / "t", [Encoded([1, 8, 3])], vocab_size=9)
    file = tmp_path / "t" / "tokens.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match="is truncated: 2 of 3 tokens"):
        TokenFile.open(tmp_path / "t")


def test_every_token_is_predicted_once(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "t", [Encoded(list(range(101)))], vocab_size=1 << 17)
    assert tokens.ids.dtype == np.uint32
    windows = Windows.of(tokens, 11)
    ids, labels = windows.get(np.arange(windows.count))
    assert windows.count == 10
    assert labels[:, 1:].flatten().tolist() == list(range(1, 101))
    assert torch.equal(ids, labels)
    training, held_out = windows.split(0.2)
    assert (training.count, held_out.count) == (8, 2)
    assert held_out.get(np.arange(2))[0][0, 0] == 80
    with pytest.raises(ValueError, match="leaves nothing on one side"):
        windows.split(0.01)
    with pytest.raises(ValueError, match="101 tokens, not enough for one sequence of 102"):
        Windows.of(tokens, 102)


def test_labels_ignore_what_does_not_count(tmp_path: Path) -> None:
    counted = [i % 4 > 0 for i in range(21)]
    tokens = write_tokens(tmp_path / "t", [Encoded(list(range(21)), counted)], vocab_size=21)
    ids, labels = Windows.of(tokens, 11).get(np.array([1]))
    assert ids[0].tolist() == list(range(10, 21))
    expected = [i if counted[i] else IGNORED for i in range(10, 21)]
    assert labels[0].tolist() == expected


def test_each_epoch_is_all_sequences_in_another_order(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "t", [Encoded(list(range(101)))], vocab_size=101)
    order = Order(Windows.of(tokens, 11), seed=5)
    first, second = order.numbers(0, 10).tolist(), order.numbers(10, 10).tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    # A batch is the same however it is asked for, also by a process that begins in the middle.
    assert order.numbers(7, 6).tolist() == (first + second)[7:13]
    assert Order(Windows.of(tokens, 11), seed=5).numbers(13, 2).tolist() == second[3:5]
    assert Order(Windows.of(tokens, 11), seed=6).numbers(0, 10).tolist() != first


def test_a_text_is_tokenised_as_it_is(tmp_path: Path) -> None:
    text = "a\r\nb\rc\u2028d\fe\x85f\0\n".encode()
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + text)
    tokens = prepare_tokens(tmp_path / "marked.txt", "bytes", tmp_path / "cache", vocab_size=257)
    assert tokens.ids.tolist() == [*text, 256]


def test_the_byte_that_is_not_utf8_is_counted_from_the_beginning(tmp_path: Path) -> None:
    line = b"x" * 99 + b"\n"
    (tmp_path / "long.txt").write_bytes(line * 30_000 + b"ab\xff\n")
    with pytest.raises(ValueError, match=r"byte 3000002 \(0xff, in line 30001\)"):
        list(documents(tmp_path / "long.txt"))
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"byte 24 \(0xff, in line 2\)"):
        list(documents(tmp_path / "rows.jsonl"))
