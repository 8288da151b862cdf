"""The model of a training run: from weights or at random, and what an export needs beside them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from colrow.any_model.loading import describe_model, known_to_decoder
from colrow.checkpoint.export_config import config_to_hf
from colrow.checkpoint.locate import resolve_model_path
from colrow.checkpoint.pretrained import from_pretrained, pretrained_config
from colrow.comm.mesh import Mesh
from colrow.files import check_inside
from colrow.generation.tokenizer import end_tokens
from colrow.layers.describe import ExpertsSpec
from colrow.layers.dropout import ParallelDropout
from colrow.leftovers import part_of
from colrow.models.build import DecoderOptions, from_config
from colrow.models.compose import with_dropout
from colrow.models.config import ModelConfig
from colrow.models.decoder import Decoder
from colrow.models.hf_config import config_from_file, read_config
from colrow.models.interface import Description, TensorParallelModel
from colrow.models.stages import LayerSplit
from colrow.pipeline.limits import ZERO_BUBBLE, check_schedule, schedule_named, split_for
from colrow.planner.stage_costs import planned_costs
from colrow.sharding import Sharding
from colrow.train.settings import TrainSettings
from colrow.train.tokenize import BYTES

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.float32,
    "fp16": torch.float32,
    "fp64": torch.float64,
}
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def build_model(settings: TrainSettings, mesh: Mesh) -> TensorParallelModel:
    """The model, in training mode, with its parameters in fp32 (fp64 for fp64).

    The decoder where it knows the family, else transformers' own model, split in place.
    """
    dtype = DTYPES[settings.precision]
    if describe(settings).kind == "in place":
        from colrow.train.in_place import build_in_place

        if settings.router_balance > 0 or settings.router_z:
            raise ValueError(
                "router_balance and router_z are of models that colrow's decoder computes, and "
                "this one is split in place: leave them out"
            )

        in_place = build_in_place(settings, mesh, dtype)
        in_place.module.train()
        return in_place
    return _build_decoder(settings, mesh, dtype).train()


def _build_decoder(settings: TrainSettings, mesh: Mesh, dtype: torch.dtype) -> Decoder:
    split = pipeline_split(settings, pretrained_config(settings.model))
    overlap = schedule_named(settings.schedule) not in ZERO_BUBBLE or settings.pp == 1
    options: DecoderOptions = {
        "sharding": Sharding(settings.sequence_parallel, overlap=overlap),
        "tensor_split": settings.tensor_split,
    }
    random = settings.from_random
    if random:
        model = from_config(
            settings.model, mesh, seed=settings.seed, dtype=dtype, layer_split=split, **options
        )
    else:
        model = from_pretrained(settings.model, mesh, dtype=dtype, layer_split=split, **options)
    if settings.dropout >= 0 or not random:
        set_dropout(model, max(0.0, settings.dropout))
    set_router_losses(model, settings.router_balance, settings.router_z)
    return model


def pipeline_split(settings: TrainSettings, config: ModelConfig) -> LayerSplit:
    """The stages of the run.

    Raises:
        ValueError: a pipeline that cannot run, with the reason.
    """
    schedule = schedule_named(settings.schedule)
    costs = planned_costs(
        config,
        tp=settings.tp,
        microbatch=settings.microbatch,
        sequence=settings.sequence,
        precision=settings.precision,
    )
    split = split_for(
        config, settings.pp, schedule, settings.layer_split, settings.stages_per_rank, costs
    )
    check_schedule(
        schedule,
        split,
        settings.microbatches,
        recompute=settings.recompute,
        fsdp=settings.fsdp and settings.dp > 1,
        tied=config.tie_embeddings,
    )
    return split


def set_dropout(model: Decoder, p: float) -> None:
    """The same probability for embeddings, attention weights and residuals."""
    for module in model.modules():
        if isinstance(module, ParallelDropout):
            module.p = p
    model.config = with_dropout(model.config, p)


def set_router_losses(model: Decoder, balance: float, z: float) -> None:
    """The coefficients of the losses on routers; a negative one stays what the configuration says.

    Raises:
        ValueError: losses for a model without experts, or in a pipeline.
    """
    balance = model.config.router_balance if balance < 0 else balance
    config = replace(model.config, router_balance=balance, router_z=z)
    losses = bool(balance or z)
    if losses and not any(isinstance(block.mlp, ExpertsSpec) for block in config.blocks):
        raise ValueError(
            f"router_balance and router_z are of mixtures of experts, and this {config.family} "
            "model has no experts: leave them out"
        )
    if losses and model.pipeline.split.ranks > 1:
        raise ValueError(
            "the losses of routers count all layers together, and a pipeline stage has some of "
            "them: set --router-balance 0 and leave --router-z out, or train with --pp 1"
        )
    model.config = config


def describe(settings: TrainSettings) -> Description:
    """What the model is, without its weights; its kind says whether the decoder computes it.

    Raises:
        ValueError: a model of neither kind, or sequences that are longer than it has positions.
    """
    description = describe_model(settings.model, in_place=settings.in_place)
    longest = description.max_positions
    if description.limited and longest is not None and settings.sequence > longest:
        raise ValueError(
            f"sequence={settings.sequence} is longer than the model's {longest} positions"
        )
    return description


def tokenizer_name(settings: TrainSettings) -> str:
    """Where the tokenizer comes from.

    Raises:
        ValueError: a model from a configuration, which has none, without ``tokenizer``.
    """
    if settings.tokenizer:
        return settings.tokenizer
    if settings.from_random:
        raise ValueError(
            f"{settings.model} is a configuration and has no tokenizer: give --tokenizer, a "
            f'checkpoint or "{BYTES}" (which needs a vocabulary of 257)'
        )
    return settings.model


def save_model_files(settings: TrainSettings, directory: Path, *, tied: bool | None) -> None:
    """Writes the configuration and the tokenizer as a Hugging Face directory has them, once.

    ``tied``: as for :func:`copy_model_files`.
    """
    if directory.exists():
        return
    part = part_of(directory)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if settings.from_random:
        shutil.copyfile(settings.model, part / "config.json")
    else:
        copy_model_files(settings.model, part, tied=tied)
    if settings.tokenizer and settings.tokenizer != BYTES:
        copy_tokenizer(settings.tokenizer, part)
    part.rename(directory)


def copy_model_files(model: str | Path, directory: Path, *, tied: bool | None = None) -> None:
    """The configuration and the tokenizer of a checkpoint; a GGUF file's are translated.

    Args:
        tied: whether the model has one matrix for embedding and head; where the weights and the
            configuration differ, the copy says what the weights do. Of a model that the decoder
            knows it is found out here.
    """
    path = resolve_model_path(model)
    if path.suffix == ".gguf":
        known = pretrained_config(path)
        config = config_to_hf(known)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if ends := end_tokens(path, known.eos_token_ids):
            text = json.dumps({"eos_token_id": list(ends)}, indent=2)
            (directory / "generation_config.json").write_text(text + "\n")
    else:
        source = path if path.is_dir() else path.parent
        check_inside(source / "config.json", source)
        shutil.copyfile(source / "config.json", directory / "config.json")
        values = read_config(source)[1]
        if tied is None and known_to_decoder(path):
            tied = pretrained_config(path).tie_embeddings
            said: object = config_from_file(source).tie_embeddings
        else:
            said = values.get("tie_word_embeddings")
        if tied is not None and tied != said:  # the weights say otherwise
            config = {**values, "tie_word_embeddings": tied}
            (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_tokenizer(path, directory)


def copy_tokenizer(model: str | Path, directory: Path) -> None:
    """The tokenizer's files; those inside a GGUF file are written by transformers."""
    path = resolve_model_path(model)
    if path.suffix == ".gguf":
        from colrow.generation.tokenizer import load_tokenizer

        load_tokenizer(path).save_pretrained(str(directory))  # type: ignore[attr-defined]
        return
    source = path if path.is_dir() else path.parent
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            check_inside(source / name, source)
            shutil.copyfile(source / name, directory / name)


def check_settings(settings: TrainSettings) -> None:
    """Finds out before any rank starts what can be found out without data.

    Raises:
        ValueError: a model that is not there or cannot be divided, a missing tokenizer or text.
    """
    if describe(settings).kind == "in place":
        from colrow.train.in_place import check_in_place

        check_in_place(settings)
    else:
        config = pretrained_config(settings.model)
        config.divide(settings.tp, settings.tensor_split)
        pipeline_split(settings, config)
    tokenizer_name(settings)
    for text in filter(None, (settings.data, settings.eval_data)):
        if not Path(text).exists():
            raise ValueError(f"there is no text at {text!r}")
