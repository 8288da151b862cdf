"""A GGUF file with a model's weights, and the rest as another GGUF file has it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from colrow._leftovers import part_of
from colrow.checkpoint.gguf_model import gguf_naming
from colrow.checkpoint.naming import pieces
from colrow.checkpoint.pretrained import pretrained_config
from colrow.models.decoder import Decoder

_DTYPES = (torch.float32, torch.float16)


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
    expected, config = pretrained_config(like), model.config
    for name in ("family", "vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_size"):
        if getattr(expected, name) != getattr(config, name):
            raise ValueError(
                f"{like} is a model with {name}={getattr(expected, name)}, not "
                f"{getattr(config, name)}: it cannot lend its configuration"
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
            wide = dtype if tensor.dim() > 1 else torch.float32
            writer.add_tensor(name, tensor.to(wide).contiguous().numpy())
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
                found[piece.name] = parameter.detach()
                continue
            start, stop = piece.target
            part = parameter.detach().narrow(spec.dim, start, stop - start)
            part = part.t() if piece.transposed else part
            part = part if piece.pairs is None else pair(part, piece.pairs)
            whole = found.setdefault(piece.name, part.new_empty(piece.shape))
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
