"""Tiny random checkpoints whose greedy answers vary, and a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colrow.verification.reference import precision, quiet_transformers
from tests.devices import moved
from tests.models import tiny

VOCAB = 97


def save(name: str, directory: Path) -> Any:
    """Writes one of ``tiny.CASES`` with larger weights; returns transformers' fp64 model."""
    model: Any = tiny.make(name, directory)
    model.generation_config.eos_token_id = None
    # While it generates, transformers would compare the mask so far with the newest token's router.
    model.config.output_router_logits = False
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.5)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.2)
    with quiet_transformers():
        model.save_pretrained(directory)
    return model


def reference(
    model: Any, ids: Tensor, mask: Tensor, new: int, eos: list[int] | None = None
) -> Tensor:
    """New tokens of transformers' greedy ``generate``, computed in fp64 throughout."""
    with precision(torch.float64), torch.inference_mode():
        out: Tensor = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
        )
    return out[:, ids.shape[1] :]


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of 9, 4 and 1 tokens, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(3)
    ids = moved(torch.randint(2, VOCAB, (3, 9), generator=generator, device="cpu"))
    mask = torch.tensor([[0] * (9 - n) + [1] * n for n in (9, 4, 1)])
    return ids * mask, mask


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'joke' %}{{ raise_exception('no jokes') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_byte_tokenizer(directory: Path) -> None:
    """A tokenizer with one token for each byte and a chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE)
    fast.save_pretrained(directory)


def save_chat_model(directory: Path) -> None:
    """A model that knows bytes alone, with their tokenizer; it never ends an answer."""
    with quiet_transformers():
        from transformers import LlamaConfig, LlamaForCausalLM

        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48}
        config = LlamaConfig(
            **heads,
            **sizes,
            num_hidden_layers=2,
            max_position_embeddings=100_000,
            bos_token_id=None,
            eos_token_id=None,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    save_byte_tokenizer(directory)
