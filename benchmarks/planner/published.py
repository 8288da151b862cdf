"""Published measurements as cases that the planner can predict.

A table's tokens or FLOP/s are turned into seconds with the FLOP formula of the same publication, so
that nothing is lost or added. Settings that were not published (microbatch, virtual stages) are the
planner's own choice: the fastest that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from colrow.planner.catalog import find_model, shape_of_sizes
from colrow.planner.data import read_table as table
from colrow.planner.hardware import Hardware, find_hardware
from colrow.planner.layout import Layout
from colrow.planner.model import ModelShape


@dataclass(frozen=True)
class Case:
    """One published row.

    Attributes:
        table: which table.
        label: the row.
        model, hardware: what ran.
        layouts: the layout, or those among which an unpublished setting is chosen.
        seconds: measured time of what ``part`` names.
        part: "step"; or "forward" and "backward" of one block.
        calibrated: whether a constant was fitted to this row.
        memory_bytes: measured on the fullest rank, where that was published.
        allocated: whether that is what the program asked of its allocator, without a reserve.
        source: of the row.
    """

    table: str
    label: str
    model: ModelShape
    hardware: Hardware
    layouts: tuple[Layout, ...]
    seconds: float
    part: str = "step"
    calibrated: bool = False
    memory_bytes: float | None = None
    allocated: bool = False
    source: str = ""


def read_table(name: str) -> tuple[dict[str, str], ...]:
    """The rows of ``data/<name>.csv`` beside this file."""
    return table(name, Path(__file__).parent / "data")


def cases() -> list[Case]:
    """Every published row that gives a time, in seconds or as FLOP/s."""
    readers: tuple[Callable[[], Iterator[Case]], ...] = (
        _layer_times,
        _scaling_2020,
        _scaling_2019,
        _narayanan_table_1,
        _narayanan_table_2,
        _h100,
    )
    return [case for reader in readers for case in reader()]


def _layer_times() -> Iterator[Case]:
    """Korthikanti et al. 2022, Table 4: one layer of the 22B model."""
    settings: dict[str, dict[str, object]] = {
        "baseline no recompute": {},
        "sequence parallelism": {"sequence_parallel": True},
        "full recompute baseline": {"recompute": "full"},
        "selective recompute": {"recompute": "selective"},
        "selective + sequence": {"recompute": "selective", "sequence_parallel": True},
    }
    base = Layout(tp=8, microbatch=4, global_batch=4, sequence=2048, software="megatron-2022")
    for row in read_table("korthikanti2022_layer_times"):
        layout = replace(base, **settings[row["experiment"]])  # type: ignore[arg-type]
        for part, column in (("forward", "fwd_ms"), ("backward", "bwd_ms")):
            yield Case(
                "Korthikanti 2022 Table 4 (layer)",
                f"{row['experiment']}, {part}",
                find_model("megatron-22b"),
                find_hardware("a100-80gb"),
                (layout,),
                float(row[column]) / 1e3,
                part,
                calibrated=True,
                source=row["source"],
            )


def _tables_layout(row: Mapping[str, str], software: str) -> Layout:
    """A row of Megatron-LM's scaling tables: fp16, 1024 tokens, one microbatch per replica."""
    dp = int(row["gpus"]) // int(row["tp"])
    batch = int(row["global_batch"])
    return Layout(
        tp=int(row["tp"]),
        dp=dp,
        microbatch=batch // dp,
        global_batch=batch,
        sequence=1024,
        recompute="full",
        precision="fp16",
        software=software,
    )


def _scaling_2020() -> Iterator[Case]:
    """Megatron-LM's tables of May and September 2020; full recomputation (from their FLOP/s)."""
    shapes = {"1": (1920, 24, 15), "2": (2304, 30, 18), "4": (3072, 36, 24), "8": (4096, 42, 32)}
    for row in read_table("megatron_tp_scaling_2019_2020"):
        if row["experiment"] == "2019 paper" or not row["iter_ms"]:
            continue
        hidden, layers, heads = shapes[row["tp"]]
        hardware = find_hardware("v100" if row["gpu"].startswith("V100") else "a100-40gb")
        may = row["experiment"].startswith("v1.0")
        layout = _tables_layout(row, "megatron-2019" if may else "megatron-2020")
        year = "May 2020" if may else "Sept 2020"
        kind = hardware.device.name.split("-")[0]
        dp_table = ", 128-way DP" if layout.dp > 1 else ""
        yield Case(
            f"Megatron-LM {year} {kind}{dp_table}",
            f"{row['params_B']}B tp{layout.tp} dp{layout.dp}",
            gpt(hidden, layers, heads, 51200, 1024),
            hardware,
            (layout,),
            float(row["iter_ms"]) / 1e3,
            calibrated=True,
            source=row["source"],
        )


def _scaling_2019() -> Iterator[Case]:
    """Shoeybi et al. 2019: weak scaling, in time relative to the first row's 39 TFLOP/s.

    Percentages are those of the single GPU's throughput, so a row's time is the first row's, times
    its FLOPs per GPU over the first's, over its percentage. The paper does not say which FLOPs it
    counts; with recomputation its 39 TFLOP/s would be a step twice as long as eight months later.
    """
    rows = [r for r in read_table("megatron_tp_scaling_2019_2020") if r["experiment"][:4] == "2019"]
    first: tuple[float, float] | None = None
    for row in rows:
        hidden, layers, heads = int(row["hidden"]), int(row["layers"]), int(row["heads"])
        model = gpt(hidden, layers, heads, 51200, 1024)
        layout = _tables_layout(row, "megatron-2019")
        work = flops(model, layout.global_batch, layout.sequence) / int(row["gpus"])
        if first is None:
            first = work, work / (float(row["tflops_per_gpu"]) * 1e12)
        seconds = first[1] * (work / first[0]) * 100 / float(row["weak_scaling_pct"])
        yield Case(
            "Shoeybi 2019 weak scaling V100",
            f"{row['params_B']}B tp{layout.tp} dp{layout.dp}",
            model,
            find_hardware("v100"),
            (layout,),
            seconds,
            calibrated=True,
            source=row["source"],
        )


def _narayanan_table_1() -> Iterator[Case]:
    for row in read_table("narayanan2021_table1"):
        model = gpt(int(row["hidden"]), int(row["layers"]), int(row["heads"]), 51200, 2048)
        batch, gpus = int(row["global_batch"]), int(row["gpus"])
        base = Layout(
            tp=int(row["tp"]),
            pp=int(row["pp"]),
            dp=gpus // (int(row["tp"]) * int(row["pp"])),
            global_batch=batch,
            sequence=2048,
            recompute="full",
            precision="fp16",
            software="megatron-2021",
        )
        rate = float(row["tflops_per_gpu"]) * 1e12 * gpus
        yield Case(
            "Narayanan 2021 Table 1",
            f"{row['params_B']}B",
            model,
            find_hardware("a100-80gb"),
            _free(base, model, microbatches=(1, 2, 4, 8, 16)),
            flops_with_recompute(model, batch, 2048) / rate,
            source=row["source"],
        )


def _narayanan_table_2() -> Iterator[Case]:
    shapes = {"174.6": (12288, 96, 96), "529.6": (20480, 105, 128)}
    for row in read_table("narayanan2021_table2"):
        model = gpt(*shapes[row["params_B"]], 51200, 2048)
        batch, gpus = int(row["global_batch"]), int(row["gpus"])
        zero = row["scheme"] == "ZeRO-3"
        tp, pp = (1, 1) if zero else (int(size) for size in row["t_x_p"].split("x"))
        base = Layout(
            tp=tp,
            pp=pp,
            dp=gpus // (tp * pp),
            microbatch=int(row["micro_batch"]),
            global_batch=batch,
            sequence=2048,
            recompute="full",
            precision="fp16",
            zero=3 if zero else 0,
            software="deepspeed-2021" if zero else "megatron-2021",
        )
        rate = float(row["tflops_per_gpu"]) * 1e12 * gpus
        layouts = (base,) if zero else _free(base, model, microbatches=(1,))
        yield Case(
            f"Narayanan 2021 Table 2 {row['scheme']}" + (f" {row['params_B']}B" if zero else ""),
            f"{row['params_B']}B {gpus} GPUs",
            model,
            find_hardware("a100-80gb"),
            layouts,
            flops_with_recompute(model, batch, 2048) / rate,
            calibrated=zero and row["params_B"] == "174.6",
            source=row["source"],
        )


def _h100() -> Iterator[Case]:
    for row in read_table("mcore_h100_weak_strong"):
        model = gpt(int(row["hidden"]), int(row["layers"]), int(row["heads"]), 131072, 4096, 0.0)
        batch, gpus = int(row["global_batch"]), int(row["gpus"])
        base = Layout(
            tp=int(row["tp"]),
            pp=int(row["pp"]),
            dp=int(row["dp"]),
            global_batch=batch,
            sequence=4096,
            sequence_parallel=int(row["tp"]) > 1,
            zero=1,
            software="megatron-core",
        )
        yield Case(
            f"Megatron-Core H100 {row['experiment']} scaling",
            f"{row['params_B']}B {gpus} GPUs",
            model,
            find_hardware("h100-80gb"),
            _free(base, model, microbatches=(1, 2, 4)),
            flops(model, batch, 4096) / (float(row["tflops_per_gpu"]) * 1e12 * gpus),
            source=row["source"],
        )


def flops(model: ModelShape, batch: int, sequence: int) -> float:
    """Model FLOPs of a step: 72 B s L h^2 (1 + s/6h + V/12hL).

    Korthikanti et al. 2022, appendix A, eq. 7; Megatron-LM's throughput counts the same.
    """
    c = model.config
    h, layers = c.hidden_size, c.num_layers
    return (
        72.0
        * batch
        * sequence
        * layers
        * h
        * h
        * (1 + sequence / (6 * h) + c.vocab_size / (12 * h * layers))
    )


def flops_with_recompute(model: ModelShape, batch: int, sequence: int) -> float:
    """With full recomputation: 96 B s L h^2 (1 + s/6h + V/16hL), Narayanan et al. 2021, eq. 3."""
    c = model.config
    h, layers = c.hidden_size, c.num_layers
    return (
        96.0
        * batch
        * sequence
        * layers
        * h
        * h
        * (1 + sequence / (6 * h) + c.vocab_size / (16 * h * layers))
    )


def gpt(
    hidden: int, layers: int, heads: int, vocab: int, positions: int, dropout: float = 0.1
) -> ModelShape:
    """A GPT of this shape."""
    return shape_of_sizes(
        f"gpt-{hidden}x{layers}",
        "gpt2",
        hidden=hidden,
        layers=layers,
        heads=heads,
        vocab=vocab,
        positions=positions,
        dropout=dropout,
    )


def _free(base: Layout, model: ModelShape, microbatches: tuple[int, ...]) -> tuple[Layout, ...]:
    """The layout with every microbatch and number of virtual stages that it allows."""
    layouts = []
    for size in microbatches:
        if base.batch % (base.dp * size):
            continue
        layout = replace(base, microbatch=size)
        layouts.append(layout)
        per_stage, rest = divmod(model.config.num_layers, base.pp)
        if base.pp == 1 or rest or layout.num_microbatches % base.pp:
            continue
        layouts += [
            replace(layout, schedule="interleaved", virtual_stages=chunks)
            for chunks in range(2, per_stage + 1)
            if per_stage % chunks == 0
        ]
    return tuple(layouts)
