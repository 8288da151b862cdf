"""The unsplit models that results are compared with."""

from __future__ import annotations

import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from colrow.verification.reference import cached_step


def test_steps_with_a_cache_give_the_whole_pass_without_a_warning() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, vocab_size=32)).double()
    ids = torch.randint(32, (2, 5))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = model(input_ids=ids).logits
        first, cache = cached_step(model, ids[:, :3], None)
        second, _ = cached_step(model, ids[:, 3:], cache)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-12)
