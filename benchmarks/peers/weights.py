"""The one set of weights that all contestants of a workload load: a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.peers.workloads import Quantised, Training, Workload
from colrow.cli import main as command
from colrow.verification.reference import quiet_transformers

CACHE = Path(".cache/peers")
FILES = Path(".cache")
TEXT = Path("LICENSE")


def prepare(workload: Workload, model: Path) -> Path:
    """Writes the weights unless they are there.

    Args:
        model: SmolLM2's GGUF file, which the decoding workloads need.

    Returns:
        A directory with config.json and model.safetensors; of quantised workloads the file.

    Raises:
        FileNotFoundError: the GGUF file is needed and missing.
    """
    if isinstance(workload, Training):
        directory = CACHE / workload.name
        if not (directory / "model.safetensors").exists():
            _random_llama(workload, directory)
        return directory
    if isinstance(workload, Quantised):
        file = FILES / workload.file
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: make bench-quantised fetches it")
        return file
    directory = CACHE / "smollm2"
    if not (directory / "model.safetensors").exists():
        if not model.exists():
            raise FileNotFoundError(f"{model} is missing: make demo fetches it, or give --model")
        if command(["convert", str(model), str(directory), "--to", "hf"]) != 0:
            raise RuntimeError(f"{model} could not be converted to {directory}")
    return directory


def _random_llama(workload: Training, directory: Path) -> None:
    with quiet_transformers():
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=workload.vocab,
            hidden_size=workload.hidden,
            num_hidden_layers=workload.layers,
            num_attention_heads=workload.heads,
            num_key_value_heads=workload.heads,
            intermediate_size=workload.ffn,
            max_position_embeddings=max(2048, workload.sequence),
            tie_word_embeddings=False,
            dtype="float32",
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)


def training_batch(workload: Training) -> torch.Tensor:
    """Token ids ``[batch, sequence]`` of every step."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(workload.vocab, (workload.batch, workload.sequence), generator=generator)


def shifted_labels(ids: torch.Tensor) -> torch.Tensor:
    """The next token at each position; -100 (not counted) at the last."""
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    return labels


def prompt(directory: Path, length: int) -> torch.Tensor:
    """Token ids ``[1, length]`` of a text; random ones would make the model repeat itself."""
    with quiet_transformers():
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(directory)(TEXT.read_text(encoding="utf-8")).input_ids
    return torch.tensor([ids[:length]])
