"""A GGUF file with a model's weights, and the rest as another GGUF file has it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from colrow.checkpoint.gguf_rope import FACTORS
from colrow.checkpoint.load import place_of
from colrow.checkpoint.naming import gguf_naming, pieces
from colrow.checkpoint.pretrained import pretrained_config
from colrow.layers.options import RopeConfig
from colrow.leftovers import part_of
from colrow.models.compose import fields_of
from colrow.models.decoder import Decoder

_DTYPES = (torch.float32, torch.float16)
# Of training, of the tokenizer, or told by the tensors that are written.
_NOT_IN_THE_FILE = {
    *("embedding_dropout", "attention_dropout", "residual_dropout", "initializer_range"),
    *("router_balance", "router_z"),
    *("scaled_residual_init", "freeze_padding", "tie_embeddings"),
    *("bos_token_id", "eos_token_ids", "pad_token_id"),
}


def _equal(lent: object, value: object) -> bool:
    """Whether two settings are the same in fp32, in which GGUF files hold numbers."""
    if isinstance(lent, RopeConfig) and isinstance(value, RopeConfig):
        return all(_equal(getattr(lent, name), of) for name, of in vars(value).items())
    if isinstance(lent, tuple) and isinstance(value, tuple):
        return len(lent) == len(value) and all(map(_equal, lent, value))
    if isinstance(lent, float) and isinstance(value, float | int):
        return math.isclose(lent, value, rel_tol=1e-6)
    return lent == value


@torch.no_grad()
def write_gguf(model: Decoder, path: str | Path, like: str | Path, dtype: torch.dtype) -> None:
    """Writes a GGUF file; it appears when it is whole.

    Args:
        model: unsplit.
        path: of the file.
        like: a GGUF file of the same architecture, whose metadata (configuration, tokenizer, chat
            template) is copied.
        dtype: of matrices, fp32 or fp16; norms and biases are fp32, as llama.cpp expects.

    Raises:
        ValueError: another dtype, another model than that of ``like``, or gguf is not installed.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"a GGUF file is written in fp32 or fp16, not {str(dtype)[6:]}")
    expected = fields_of(pretrained_config(like))
    for name, value in fields_of(model.config).items():
        lent = expected[name]
        if name not in _NOT_IN_THE_FILE and not _equal(lent, value):
            raise ValueError(
                f"{like} is a model with {name}={lent!r}, not {value!r}: it cannot lend its "
                "configuration"
            )
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ValueError(f"GGUF needs {error.name}: pip install 'colrow[models]'") from error
    path = Path(path)
    part = part_of(path)
    source = gguf.GGUFReader(str(like))
    writer = gguf.GGUFWriter(part, source.fields["general.architecture"].contents())
    try:
        for field in source.fields.values():
            ours = field.name.startswith("GGUF.") or field.name == "general.architecture"
            if not ours and field.name not in ("general.file_type", "general.quantization_version"):
                sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(
                    field.name, field.contents(), field.types[0], sub_type=sub_type
                )
        for name, tensor in _tensors(model).items():
            wide = dtype if tensor.dim() > 1 and "norm" not in name else torch.float32
            writer.add_tensor(name, tensor.to(wide).contiguous().numpy())
        for lent in source.tensors:
            if lent.name in FACTORS:
                writer.add_tensor(lent.name, lent.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _tensors(model: Decoder) -> dict[str, Tensor]:
    """Every tensor under its name in the file, in the file's layout."""
    naming, found = gguf_naming(model.config), {}
    for name, parameter in model.named_parameters():
        spec = model.specs[name]
        for piece in pieces(naming, model.config, name, spec, 0):
            if piece.dim is None or spec.dim is None:
                whole = parameter.detach()
                if piece.added:  # before it is rounded to fewer digits than the sum has
                    whole = (whole if whole.dtype == torch.float64 else whole.float()) + piece.added
                found[piece.name] = whole
                continue
            part = place_of(parameter.detach(), spec, piece)
            part = part.t() if piece.transposed else part
            part = part if piece.pairs is None else pair(part, piece.pairs)
            whole = found.setdefault(piece.name, part.new_empty(piece.shape))
            if piece.stacked:
                whole = whole[piece.expert]
            taken = 0
            for first, last in piece.ranges:
                whole.narrow(piece.dim, first, last - first).copy_(
                    part.narrow(piece.dim, taken, last - first)
                )
                taken += last - first
    return found


def pair(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads from halves (i, i + dim / 2) to interleaved rotary pairs (2i, 2i + 1)."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)
