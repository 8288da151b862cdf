"""Megatron Bridge's published performance: 8-bit training on H100 to GB300.

Of the releases of one setting the newest counts. What the table does not say is as in the recipes
(NVIDIA-NeMo/Megatron-Bridge, src/megatron/bridge/perf_recipes): nothing is computed again, and
where parameters are divided over all devices the activations of 40 layers (GB200) or 20 (GB300) go
to the host. NVFP4, which the planner does not know, and rows of two precisions are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.planner.published import Case, read_table
from colrow.planner.catalog import find_model
from colrow.planner.hardware import find_hardware
from colrow.planner.layout import Layout

_MODELS = {"LLAMA3_70B": "llama-3-70b", "Qwen3_30B_a3B": "qwen3-30b-a3b"}
_OFFLOADED = {"DGX-GB200": 40, "DGX-GB300": 20}
_LORA_RANK = 16
_PRECISIONS = {"FP8": "FP8", "FP8-CS": "FP8", "MXFP8": "MXFP8", "FP8-MX": "MXFP8"}


def bridge_cases() -> Iterator[Case]:
    """One case for each setting."""
    newest: dict[tuple[str, ...], dict[str, str]] = {}
    for row in read_table("megatron_bridge_perf_all"):
        if row["precision"] not in _PRECISIONS:
            continue
        columns = ("task", "model", "system", "gpus", "precision", "mbs", "tp", "pp", "ep", "fsdp")
        row |= {"precision": _PRECISIONS[row["precision"]]}
        name = tuple(row[column] if row[column] not in ("", "n/a") else "0" for column in columns)
        if name not in newest or row["release"] > newest[name]["release"]:
            newest[name] = row
    for row in newest.values():
        experts = row["model"].startswith("Qwen3")
        tp, pp, cp = (int(row[size]) for size in ("tp", "pp", "cp"))
        chunks = 1 if row["vp"] == "n/a" else int(row["vp"])
        sharded = row["fsdp"] not in ("", "0")
        adapters = row["task"].startswith("LoRA")
        layout = Layout(
            tp=tp,
            pp=pp,
            cp=cp,
            dp=int(row["gpus"]) // (tp * pp * cp),
            ep=int(row["ep"]) if experts else 1,
            microbatch=int(row["mbs"]),
            global_batch=int(row["gbs"]),
            sequence=int(row["seq"]),
            sequence_parallel=tp > 1,
            schedule="interleaved" if chunks > 1 and pp > 1 else "1f1b",
            virtual_stages=chunks if pp > 1 else 1,
            zero=3 if sharded else 1,
            precision="fp8",
            lora_rank=_LORA_RANK if adapters else 0,
            offload_layers=_OFFLOADED.get(row["system"], 0) if sharded else 0,
            software="megatron-core",
        )
        kind = "experts" if experts else "LoRA" if adapters else "dense"
        yield Case(
            f"Megatron-Bridge, {kind}",
            f"{row['model']} {row['system'][4:]} {row['precision']}",
            find_model(_MODELS[row["model"]]),
            find_hardware(row["system"].removeprefix("DGX-")),
            (layout,),
            layout.batch * layout.sequence / (float(row["tok_s_gpu"]) * int(row["gpus"])),
            calibrated=row["task"].startswith("Pre") and "GB" in row["system"] and not experts,
            source=row["source"],
        )
