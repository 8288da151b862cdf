"""Published sweeps over many layouts of one model, as cases that the planner can predict.

Where :mod:`benchmarks.planner.published` has single tables of papers, these have the same model on
the same devices in many layouts, so that they also tell whether the planner would have chosen well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks.planner.bridge import bridge_cases
from benchmarks.planner.playbook import playbook_cases
from benchmarks.planner.published import Case, flops_with_recompute, gpt, read_table
from colrow.planner.catalog import find_model
from colrow.planner.hardware import find_hardware
from colrow.planner.layout import Layout
from colrow.planner.model import ModelShape

GIB = float(1 << 30)


def sweep_cases() -> list[Case]:
    """Every row of every sweep that ran."""
    readers: tuple[Callable[[], Iterator[Case]], ...] = (
        _vtrain_single,
        _vtrain_multi,
        _narayanan_figure_13,
        _bloom,
        _simumax,
        _torchtitan,
        playbook_cases,
        bridge_cases,
    )
    return [case for reader in readers for case in reader()]


def _sizes(row: dict[str, str]) -> dict[str, int]:
    return {name: int(row[name]) for name in ("tp", "pp", "dp")}


def _vtrain(table: str, title: str) -> Iterator[Case]:
    """Megatron-DeepSpeed on A100, full recomputation (VIA-Research/vTrain)."""
    for row in read_table(table):
        layout = Layout(
            **_sizes(row),
            microbatch=int(row["micro_batch"]),
            global_batch=int(row["global_batch"]),
            sequence=int(row["seq"]),
            recompute="full",
            precision="fp16",
            software="megatron-deepspeed",
        )
        shape = (int(row["hidden"]), int(row["layers"]), int(row["heads"]))
        small = layout.tp == layout.microbatch == 1 and "single" in table
        yield Case(
            title,
            f"{row['layers']} layers, batch {layout.batch}",
            gpt(*shape, 51200, layout.sequence),
            find_hardware("a100-80gb"),
            (layout,),
            float(row["iter_ms"]) / 1e3,
            calibrated=small,
            source=row["source"],
        )


def _vtrain_single() -> Iterator[Case]:
    yield from _vtrain("vtrain_ground_truth_single", "vTrain, one node, hidden 1024")


def _vtrain_multi() -> Iterator[Case]:
    yield from _vtrain("vtrain_ground_truth_multi", "vTrain, 32 nodes, 18.4B")


def _narayanan_figure_13() -> Iterator[Case]:
    """Narayanan et al. 2021, Figure 13: tensor against pipeline parallelism on 64 A100."""
    for row in read_table("narayanan2021_figures"):
        model = gpt(20480, 32, 128, 51200, 2048)
        layout = Layout(
            **_sizes(row),
            microbatch=1,
            global_batch=int(row["global_batch"]),
            sequence=2048,
            recompute="full",
            precision="fp16",
            software="megatron-2021",
        )
        work = flops_with_recompute(model, layout.batch, 2048)
        yield Case(
            "Narayanan 2021 Figure 13",
            f"162.2B batch {layout.batch}",
            model,
            find_hardware("a100-80gb"),
            (layout,),
            work / (float(row["value"]) * 1e12 * layout.devices),
            source=row["source"],
        )


def _bloom() -> Iterator[Case]:
    """BLOOM's trials at Jean Zay, February 2022.

    Layers are not in the table; they follow from its TFLOP/s, which count 96 B s L h^2. The
    vocabulary of these trials has 250k tokens. A batch is cut to a multiple of dp x microbatch.
    """
    hidden, sequence = 14400, 2048
    for row in read_table("bloom_jeanzay_a100"):
        batch, seconds = int(row["gbs"]), float(row["sec_per_iter"])
        done = float(row["tflops_per_gpu"]) * 1e12 * int(row["gpus"]) * seconds
        layers = round(done / (96 * batch * sequence * hidden**2))
        each = int(row["dp"]) * int(row["mbs"])
        layout = Layout(
            **_sizes(row),
            microbatch=int(row["mbs"]),
            global_batch=batch - batch % each,
            sequence=sequence,
            recompute="full",
            precision="fp16",
            zero=1,
            software="megatron-deepspeed",
        )
        yield Case(
            "BLOOM, Jean Zay, 150 per head",
            f"{row['size']} {row['gpus']} GPUs",
            gpt(hidden, layers, int(row["heads"]), 250880, sequence),
            find_hardware("a100-80gb"),
            (layout,),
            seconds,
            calibrated=True,
            memory_bytes=float(row["mem_GB"]) * 1e9,
            source=row["source"],
        )


def _deepseek_v2(layers: int) -> ModelShape:
    """DeepSeek-V2 with so many layers, the first of them without experts."""
    whole = find_model("deepseek-v2")
    return replace(whole, config=replace(whole.config, blocks=whole.config.blocks[:layers]))


def _simumax() -> Iterator[Case]:
    """Models' shapes with few layers on 8 B200, Megatron-Core (MooreThreads/SimuMax).

    Llama-3-70B's with 12, also over parts of long sequences, and DeepSeek-V2's with 4.
    """
    titles = {"llama3_70b": "SimuMax B200, dense", "deepseekv2": "SimuMax B200, experts"}
    for row in read_table("simumax_b200"):
        layers, cp = int(row["layers"]), int(row["cp"])
        if row["model"] == "llama3_70b":
            whole = find_model("llama-3-70b")
            model = replace(
                whole, config=replace(whole.config, blocks=whole.config.blocks[:layers])
            )
        else:
            model = _deepseek_v2(layers)
        layout = Layout(
            **_sizes(row),
            cp=cp,
            ep=int(row["ep"]),
            microbatch=1,
            global_batch=int(row["dp"]) * int(row["num_microbatches"]),
            sequence=int(row["seq"]),
            sequence_parallel=int(row["tp"]) > 1,
            zero=1,
            software="megatron-core-default",
        )
        yield Case(
            "SimuMax B200, long sequences" if cp > 1 else titles[row["model"]],
            f"{row['num_microbatches']} microbatches",
            model,
            find_hardware("b200-180gb"),
            (layout,),
            float(row["real_ms"]) / 1e3,
            memory_bytes=float(row["real_alloc_GiB"]) * GIB,
            allocated=True,
            source=row["source"],
        )


def _torchtitan() -> Iterator[Case]:
    """FSDP2 with and without tensor parallelism; pipelines, which there also divide the context.

    A pipeline had as many microbatches as stages, torchtitan's default at the time: with 1F1B and
    interleaved stages its two rates are as such bubbles make them. There FSDP2 keeps what it
    gathered, and reduces gradients with the last microbatch, as ZeRO-1 does. How many interleaved
    stages a device had is not said; two are taken.
    """
    models = {
        "Llama3-8B": "llama-3-8b",
        "Llama2-13B": "llama-2-13b",
        "Llama3.1-405B": "llama-3.1-405b",
    }
    for row in read_table("torchtitan"):
        if row["act_ckpt"].startswith("SAC"):
            continue
        turns = 2 if "Interleaved" in row["technique"] else 1
        tp, pp, cp = (int(row[name]) for name in ("tp", "pp", "cp"))
        shards, batch = int(row["fsdp"]), int(row["local_batch"])
        layout = Layout(
            tp=tp,
            pp=pp,
            cp=cp,
            dp=shards,
            microbatch=batch // pp,
            global_batch=batch * shards,
            sequence=int(row["seq"]),
            sequence_parallel=tp > 1,
            schedule="interleaved" if turns > 1 else "1f1b",
            virtual_stages=turns,
            zero=3 if pp == 1 else 1,
            precision="fp8" if "fp8" in row["technique"] else "bf16",
            recompute="full" if row["act_ckpt"] == "full" else "none",
            software="torchtitan-async-tp" if "async" in row["technique"].lower() else "torchtitan",
        )
        tokens = layout.batch * layout.sequence
        yield Case(
            "torchtitan, FSDP2" if pp == 1 else "torchtitan, pipelines",
            f"{row['model']} {row['technique']}",
            find_model(models[row["model"]]),
            find_hardware("a100-80gb" if row["hardware"] == "A100" else "h100-96gb"),
            (layout,),
            tokens / (float(row["tps_per_gpu"]) * int(row["gpus"])),
            memory_bytes=float(row["mem_GiB"]) * GIB if row["mem_GiB"] else None,
            source=row["source"],
        )
