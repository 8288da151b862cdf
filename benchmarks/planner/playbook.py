"""The ultrascale playbook: a 3B model on H100 in nanotron, in hundreds of layouts on 8 to 512 GPUs.

The cluster was shared. The same layout is there at several times its own speed, so of the settings
of a layout (microbatch, ZeRO) the fastest run says most; the others are a table of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from benchmarks.planner.published import Case, read_table
from colrow.planner.catalog import shape_of_sizes
from colrow.planner.hardware import find_hardware
from colrow.planner.layout import Layout
from colrow.planner.model import ModelShape

_TABLE = "ultrascale_playbook_h100_benchmarks"
HARDWARE = "h100-80gb-efa"
SLOWER = "Ultrascale playbook, slower"


def playbook_cases() -> Iterator[Case]:
    """Every row that ran."""
    rows = [row for row in read_table(_TABLE) if row["status"] == "ok" and _runs(row)]
    fastest: dict[tuple[str, ...], float] = {}
    for row in rows:
        fastest[_name(row)] = max(fastest.get(_name(row), 0.0), float(row["tok_s"]))
    for row in rows:
        layout = _layout(row)
        first = float(row["tok_s"]) == fastest[_name(row)]
        yield Case(
            f"Ultrascale playbook, {row['gpus']} H100" if first else SLOWER,
            f"batch {layout.batch}",
            _model(row),
            find_hardware(HARDWARE),
            (layout,),
            layout.batch * layout.sequence / float(row["tok_s"]),
            calibrated=_fitted(layout),
            memory_bytes=float(row["mem_GB"]) * 1e9,
            allocated=True,
            source="huggingface, ultrascale-playbook, H100 benchmarks",
        )


def playbook_fits() -> Iterator[tuple[ModelShape, Layout, bool]]:
    """Every row with whether it ran; those that did not ran out of memory or failed otherwise."""
    for row in read_table(_TABLE):
        if _runs(row):
            yield _model(row), _layout(row), row["status"] == "ok"


def _runs(row: dict[str, str]) -> bool:
    return int(row["pp"]) <= int(row["layers"])


def _name(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in ("gpus", "dp", "tp", "pp"))


def _fitted(layout: Layout) -> bool:
    """Whether a constant of the planner was fitted to the row; see software.py, node_links.py."""
    if layout.devices == 8:
        return layout.tp >= 4 and layout.pp == layout.microbatch == 1
    if layout.devices in (16, 32):
        return layout.pp > 1 and 2 <= layout.tp <= 8 and layout.microbatch <= 2
    return layout.devices == 512 and layout.pp > 1


@cache
def _shape(hidden: int, layers: int, heads: int, ffn: int, vocab: int, tied: bool) -> ModelShape:
    model = shape_of_sizes(
        "3b",
        "llama",
        hidden=hidden,
        layers=layers,
        heads=heads,
        ffn=ffn,
        vocab=vocab,
        positions=4096,
    )
    return replace(model, config=replace(model.config, tie_embeddings=tied))


def _model(row: dict[str, str]) -> ModelShape:
    sizes = (int(row[name]) for name in ("hidden", "layers", "heads", "ffn", "vocab"))
    return _shape(*sizes, row["tied"] == "1")


def _layout(row: dict[str, str]) -> Layout:
    return Layout(
        tp=int(row["tp"]),
        pp=int(row["pp"]),
        dp=int(row["dp"]),
        microbatch=int(row["mbs"]),
        global_batch=int(row["gbs_seqs"]),
        sequence=int(row["seq_len"]),
        sequence_parallel=int(row["tp"]) > 1,
        zero=int(row["zero"]),
        software="nanotron",
    )
