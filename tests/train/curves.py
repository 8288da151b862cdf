"""Loss curves of many layouts and of one process of transformers and torch, on real text.

    python -m tests.train.curves --steps 200 --plot docs/images/training-curves.png

prints the table of ``docs/training.md`` and draws its plot.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import colrow
from colrow.train.batches import Order, Windows
from colrow.train.loop import train
from colrow.train.optimizer import learning_rate
from colrow.train.settings import TrainSettings
from colrow.train.tokenize import prepare_tokens
from colrow.verification.reference import precision, quiet_transformers
from tests.ranks import run_world

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,  # bytes and the end; 129 + 128 on two ranks
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,  # 2 + 1 on two ranks
    "num_key_value_heads": 1,  # held by all ranks
    "head_dim": 16,
    "intermediate_size": 101,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "eos_token_id": 256,
}
OPTIONS: dict[str, Any] = {
    "tokenizer": "bytes",
    "sequence": 33,
    "microbatch": 2,
    "global_batch": 8,
    "learning_rate": 3e-3,
    "warmup_steps": 10,
    "log_every": 1,
    "save_every": 10**6,
    "eval_every": 0,
    "eval_sequences": 8,
    "device": "cpu",
}


@dataclass(frozen=True)
class Case:
    """One layout."""

    name: str
    options: dict[str, Any]

    @property
    def ranks(self) -> int:
        return int(self.options.get("tp", 1)) * int(self.options.get("dp", 1))


CASES = [
    Case("tp1", {}),
    Case("tp2", {"tp": 2}),
    Case("tp2 SP", {"tp": 2, "sequence_parallel": True}),
    Case("tp2 x dp2", {"tp": 2, "dp": 2}),
    Case("tp2 x dp2 SP FSDP", {"tp": 2, "dp": 2, "sequence_parallel": True, "fsdp": True}),
    Case("tp3", {"tp": 3}),
]


def write_inputs(directory: Path, config: dict[str, Any] | None = None) -> None:
    """The text and the configuration."""
    text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    (directory / "topics.txt").write_text(text, encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(config or CONFIG), encoding="utf-8")


def settings_for(directory: Path, output: str, **options: Any) -> TrainSettings:
    """Of a run on the inputs in ``directory``."""
    return TrainSettings(
        **{
            **OPTIONS,
            "model": str(directory / "config.json"),
            "data": str(directory / "topics.txt"),
            "output": str(directory / output),
            "token_cache": str(directory / "tokens"),
            **options,
        }
    )


def logged(settings: TrainSettings) -> list[dict[str, Any]]:
    """The log of a run: of its steps, without what was before the first."""
    lines = Path(settings.output, "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if (record := json.loads(line))["step"] > 0]


def curve(directory: Path, case: Case, precision_name: str, steps: int) -> list[dict[str, Any]]:
    """Trains with a layout; its log."""
    output = f"{case.name}-{precision_name}".replace(" ", "-")
    settings = settings_for(
        directory, output, steps=steps, precision=precision_name, **case.options
    )
    run_world(case.ranks, train, settings, timeout=1200)
    return logged(settings)


def reference(settings: TrainSettings) -> list[tuple[float, float]]:
    """Loss and gradient norm at each step of transformers' model and torch's optimiser.

    From this project come only the initial weights and the order of the text.
    """
    dtype = {"fp64": torch.float64, "fp32": torch.float32}[settings.precision]
    config = json.loads(Path(settings.model).read_text())
    initial = colrow.full_state_dict(
        colrow.from_config(settings.model, seed=settings.seed, dtype=dtype)
    )
    with quiet_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM

        kind = config["model_type"]
        keys = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys), dtype=dtype)
        model.load_state_dict(initial, strict=True)
    return curve_of(settings, model)


def curve_of(settings: TrainSettings, model: Any) -> list[tuple[float, float]]:
    """The same of any model of transformers."""
    tokens = prepare_tokens(
        settings.data, "bytes", settings.token_cache, vocab_size=257, end_token=256
    )
    order = Order(
        Windows.of(tokens, settings.sequence).split(settings.eval_share)[0], settings.seed
    )
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )
    found = []
    for step in range(settings.steps):
        ids, labels = order.batch(step * settings.global_batch, settings.global_batch)
        with precision(model.dtype):
            logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1),
            labels[:, 1:].flatten(),
            label_smoothing=settings.label_smoothing,
        )
        if settings.z_loss:
            valid = labels[:, 1:] != -100
            squares = torch.logsumexp(logits[:, :-1], -1).square()
            loss = loss + settings.z_loss * squares[valid].mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step,
                peak=settings.learning_rate,
                warmup_steps=settings.warmup_steps,
                total_steps=settings.steps,
            )
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def worst(
    records: list[dict[str, Any]], expected: list[tuple[float, float]]
) -> tuple[float, float]:
    """Largest relative difference of loss and gradient norm over all steps."""
    assert len(records) == len(expected)
    pairs = list(zip(records, expected, strict=True))
    return (
        max(abs(r["loss"] / loss - 1) for r, (loss, _) in pairs),
        max(abs(r["grad_norm"] / norm - 1) for r, (_, norm) in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    curves: dict[str, list[float]] = {}
    print("| layout | ranks | fp64: loss | gradient norm | fp32: loss | gradient norm |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_inputs(directory)
        expected = {
            dtype: reference(settings_for(directory, "-", steps=args.steps, precision=dtype))
            for dtype in ("fp64", "fp32")
        }
        curves["one process: transformers, torch"] = [loss for loss, _ in expected["fp64"]]
        for case in CASES:
            cells = []
            for dtype in ("fp64", "fp32"):
                records = curve(directory, case, dtype, args.steps)
                cells += [f"{error:.1e}" for error in worst(records, expected[dtype])]
                curves[f"{case.name}, {dtype}"] = [record["loss"] for record in records]
            print(f"| {case.name} | {case.ranks} | {' | '.join(cells)} |")
            sys.stdout.flush()
    if args.plot:
        plot(curves, args.plot)


def plot(curves: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    base = next(iter(curves.values()))
    top.plot(base, color="black", linewidth=1, label=next(iter(curves)))
    for number, (name, losses) in enumerate(list(curves.items())[1:]):
        color, style = f"C{number // 2}", ("-", ":")[number % 2]  # fp64, fp32
        top.plot(losses, style, color=color, linewidth=1)
        differences = [max(abs(a / b - 1), 1e-17) for a, b in zip(losses, base, strict=True)]
        bottom.semilogy(differences, style, color=color, label=name, linewidth=1)
    top.set(ylabel="loss per token (nats)")
    bottom.set(xlabel="step", ylabel="relative difference", ylim=(1e-17, 1e-3))
    top.legend(fontsize=8)
    bottom.legend(fontsize=6, ncols=6, loc="center")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
