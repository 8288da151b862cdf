"""What a model's own code decides by divided values, between the modules that are split."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from colrow.inplace.calls import tensors_of
from colrow.inplace.capture import evaluating, run_example, without_cache
from colrow.inplace.infer import Inference
from colrow.inplace.vocabulary import VocabularyLayers, given_loss, knows_loss
from colrow.inplace.watch import Watch

Divided = Callable[[Any], Collection[Tensor]]
"""Which tensors of a module's result are divided."""


@contextmanager
def watched_between(
    model: nn.Module, watch: Watch, modules: Mapping[str, Divided]
) -> Iterator[None]:
    """Forward passes inside it are watched, but for what happens in these modules."""

    def before(module: nn.Module, args: Any) -> None:
        watch.begin_elsewhere()

    def after(divided: Divided) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            watch.end_elsewhere()
            if watch.follows:
                for x in divided(output):
                    watch.mark(x)

        return hook

    handles = []
    for name, divided in modules.items():
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after(divided), always_call=True))
    try:
        with watch:
            yield
    finally:
        for handle in handles:
            handle.remove()


def keep_what_is_decided_by(
    model: nn.Module, batch: Mapping[str, Any], inference: Inference
) -> Inference:
    """Modules that give away a part of their features are split only if nothing depends on it.

    Such results are attention weights, or a table of positions that one layer makes for all.
    """
    modules: dict[str, Divided] = {}
    local: set[str] = set()
    for name, proofs in inference.proofs.items():
        numbers = {number for proof in proofs for number in proof.local_results}
        modules[name] = _numbered(numbers)
        if numbers:
            local.add(name)
    if not local:
        return inference
    watch = Watch()
    with torch.no_grad(), watched_between(model, watch, modules):
        run_example(model, batch)
    if not (reason := watch.problem or watch.decided):
        return inference
    return inference.only(inference.proofs.keys() - local, f"the model's own code: {reason}")


def _numbered(numbers: Collection[int]) -> Divided:
    return lambda output: [x for i, x in enumerate(tensors_of(output)) if i in numbers]


def local_loss_is_right(
    model: nn.Module, batch: Mapping[str, Any], layers: VocabularyLayers
) -> bool:
    """Whether the model decides nothing by its logits before it takes its loss from them."""
    if "input_ids" not in batch or not knows_loss(model, layers):
        return True
    watch = Watch()
    (head,) = layers.heads
    entered = False

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal entered
        if not entered:
            entered = True
            watch.__enter__()
        watch.mark(output)

    def loss(own: Any) -> Any:
        def of(*args: Any, **kwargs: Any) -> Any:
            with watch.elsewhere():
                return own(*args, **kwargs)

        return of

    handle = model.get_submodule(head).register_forward_hook(after)
    try:
        with torch.no_grad(), evaluating(model), without_cache(model), given_loss(model, loss):
            model(**batch, labels=batch["input_ids"])
    except Exception:  # whatever the model's code raises
        return False
    finally:
        watch.__exit__()
        handle.remove()
    return not (watch.problem or watch.decided)
