"""The unsplit model that results are compared with: transformers' own, on one device.

transformers computes parts of its models in fp32 whatever the dtype (norms, rotations, softmax), so
an fp64 model of it is not accurate to fp64. :class:`FullPrecision` lets those parts run in fp64.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from functools import cache as once
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colrow.checkpoint.locate import resolve_model_path
from colrow.checkpoint.naming import Naming


class FullPrecision(TorchFunctionMode):
    """Inside it, whatever asks torch for fp32 gets fp64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replaces the dtype float32 in the arguments, and ``.float()`` by ``.double()``."""
        if func is Tensor.float:
            func = Tensor.double
        swapped = [_widen(value) for value in args]
        return func(*swapped, **{key: _widen(v) for key, v in (kwargs or {}).items()})


@contextmanager
def full_precision() -> Iterator[None]:
    """Where torch is asked for fp32, and where it is not asked at all, it gives fp64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with FullPrecision():
            yield
    finally:
        torch.set_default_dtype(before)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def precision(dtype: torch.dtype) -> AbstractContextManager[object]:
    """The mode in which a reference of this dtype should run."""
    return FullPrecision() if dtype == torch.float64 else nullcontext()


def load_reference(path: str | Path, dtype: torch.dtype) -> nn.Module:
    """transformers' model of this checkpoint, whole, on the CPU, in eval mode.

    Raises:
        ValueError: when transformers is not installed or cannot read the checkpoint.
    """
    file = resolve_model_path(path)
    with quiet_transformers():
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as error:
            raise ValueError(
                "the reference needs transformers: pip install 'colrow[models]'"
            ) from error
        directory = file if file.is_dir() else file.parent
        is_gguf = file.suffix == ".gguf"
        options = {"gguf_file": file.name} if is_gguf else {}
        # On the CPU, whatever torch's default is.
        with torch.device("cpu"), _gguf_once() if is_gguf else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, trust_remote_code=False, **options
            )
    if dtype == torch.float64:
        model = model.double()  # also the routers that transformers makes in fp32
    return prepare_reference(model)


@contextmanager
def _gguf_once() -> Iterator[None]:
    """Half the time of reading a GGUF file: transformers parses it twice, and makes the table of
    its tensors' names anew for every module; here the gguf package does each once.
    """
    import gguf

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, value in kept.items():
            setattr(gguf, name, once(value))
        yield
    finally:
        for name, value in kept.items():
            setattr(gguf, name, value)


def prepare_reference(model: nn.Module) -> nn.Module:
    """A transformers model as a reference: in eval mode, with derivatives that torch made.

    BLOOM's activation comes with a hand-written derivative whose constant is rounded to ten
    digits; its own forward formula is differentiated by torch instead. Experts are computed one by
    one, since grouped matmuls know no fp64.
    """
    choose: Any = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("eager")
    for module in model.modules():
        if type(module).__name__ == "BloomGelu":
            from transformers.models.bloom.modeling_bloom import bloom_gelu_forward

            module.forward = bloom_gelu_forward
    return model.eval()


def reference_grads(model: nn.Module, naming: Naming) -> dict[str, Tensor]:
    """The model's gradients, under the names of its checkpoint files."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return reference_names(model, grads, naming)


def reference_names(
    model: nn.Module, tensors: Mapping[str, Tensor], naming: Naming
) -> dict[str, Tensor]:
    """The tensors of a transformers model under the names of its checkpoint files.

    transformers renames some when it reads a file (GPT-NeoX's ``embed_out``), and stacks experts.
    """
    from transformers.core_model_loading import revert_weight_conversion

    head = naming.modules["head"][0]
    as_saved: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return {
        (f"{head}.weight" if name == "lm_head.weight" else name): tensor
        for name, tensor in as_saved.items()
    }


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and advice, some of which know no switch."""
    before = os.environ.get("TRANSFORMERS_VERBOSITY")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            from transformers.utils import logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
            yield
    finally:
        if before is None:
            del os.environ["TRANSFORMERS_VERBOSITY"]
        else:
            os.environ["TRANSFORMERS_VERBOSITY"] = before


def cached_step(model: Any, ids: Tensor, cache: Any, **options: Any) -> tuple[Tensor, Any]:
    """Logits of ``ids``, which follow what ``cache`` holds, and the cache with them in it.

    transformers 5.24 calls the cache ``cache`` where older releases, and models that are not in
    transformers, say ``past_key_values``.

    Args:
        model: a causal language model of transformers.
        ids: ``[batch, new tokens]``.
        cache: None for the first call.
        options: handed to the model.
    """
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    result = model(input_ids=ids, use_cache=True, **{name: cache}, **options)
    return result.logits, result[name]
