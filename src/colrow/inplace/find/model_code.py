"""What a model's own code does with divided values, between the modules that are split."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from colrow.inplace.find.infer import Inference
from colrow.inplace.find.whole_results import VocabularyLayers, knows_loss, with_changed_loss
from colrow.inplace.observe.calls import full_name, tensors_of
from colrow.inplace.observe.following import following
from colrow.inplace.observe.modes import arithmetic_of, evaluating, run_example, without_cache
from colrow.inplace.observe.watch import ValueWatch

Divided = Callable[[Any], Collection[Tensor]]
"""Which tensors of a module's result are divided."""


@contextmanager
def watched_between(
    model: nn.Module, watch: ValueWatch, modules: Mapping[str, Divided]
) -> Iterator[None]:
    """Inside it, ``watch`` follows forward passes, but for what happens in these modules."""

    def finish(divided: Divided) -> Callable[[Any], None]:
        def after(output: Any) -> None:
            watch.end_elsewhere()
            if watch.follows:
                for x in divided(output):
                    watch.mark(x)

        return after

    with ExitStack() as inside:
        for name, divided in modules.items():
            module = model.get_submodule(name)
            _around(inside, module, lambda _: watch.begin_elsewhere(), finish(divided))
        inside.enter_context(following(watch))
        yield


def _around(
    inside: ExitStack,
    module: nn.Module,
    before: Callable[[Any], None],
    after: Callable[[Any], None],
) -> None:
    """Until ``inside`` is left: these get the module's positional arguments and its result."""
    inside.enter_context(module.register_forward_pre_hook(lambda _, args: before(args)))
    inside.enter_context(
        module.register_forward_hook(lambda _, args, output: after(output), always_call=True)
    )


def keep_what_is_used_elsewhere(
    model: nn.Module, batch: Mapping[str, Any], inference: Inference, layers: VocabularyLayers
) -> Inference:
    """Leaves whole what gives divided features to other code that decides something by them.

    Such are attention weights, a table of positions that one layer makes for all, activations that
    a module keeps for a penalty in training. What is computed of them in eval mode without a
    decision is compared later, with the whole model's results.
    """
    giving = {
        name
        for name, proofs in inference.proofs.items()
        if any(proof.local_results or proof.keeps for proof in proofs)
    }
    if not giving:
        return inference
    watch, training = ValueWatch(), ValueWatch()
    with torch.no_grad(), _followed_through(model, watch, inference):
        run_example(model, batch)
    reason = watch.problem or watch.decided
    if not reason:
        given = dict(batch)
        if knows_loss(model, layers, batch):
            given["labels"] = batch["input_ids"]
        with _as_in_training(model), _followed_through(model, training, inference):
            try:
                model(**given)
            except Exception:  # whatever the model's code raises: it is not for training
                training.touched.clear()
        if more := sorted(training.touched - watch.touched):
            reason = f"in training it computes with divided values: {more[0]}"
    if not reason:
        return inference
    return inference.only(inference.proofs.keys() - giving, f"the model's own code: {reason}")


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Training mode, of which nothing is left afterwards: no statistics, no random numbers."""
    states = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    with (
        torch.no_grad(),
        evaluating(model),
        arithmetic_of(model),
        without_cache(model),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            for module in model.modules():
                module.training = True
            yield
        finally:
            for module, attributes, buffers in states:
                for name in vars(module).keys() - attributes.keys():
                    del module.__dict__[name]
                module.__dict__.update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)
            for buffer, value in values:
                buffer.copy_(value)


@contextmanager
def _followed_through(model: nn.Module, watch: ValueWatch, inference: Inference) -> Iterator[None]:
    """Forward passes inside it are watched, with what each group of layers divides."""

    def begin_elsewhere(args: Any) -> None:
        watch.begin_elsewhere()

    def end_elsewhere(output: Any) -> None:
        watch.end_elsewhere()

    def finish(numbers: Collection[int]) -> Callable[[Any], None]:
        def after(output: Any) -> None:
            watch.end_proven()
            for number, x in enumerate(tensors_of(output)):
                watch.mark(x) if number in numbers else watch.unmark(x)

        return after

    with ExitStack() as inside:
        for name, proofs in inference.proofs.items():
            numbers = {number for proof in proofs for number in proof.local_results}
            proven = model.get_submodule(name)
            _around(inside, proven, lambda _: watch.begin_proven(), finish(numbers))
            for proof in proofs:
                for column in proof.group.columns:
                    layer = model.get_submodule(full_name(name, column))
                    _around(inside, layer, lambda _: None, watch.mark)
                for row in proof.group.rows:
                    layer = model.get_submodule(full_name(name, row))
                    _around(inside, layer, begin_elsewhere, end_elsewhere)
                for parameter in proof.group.parameters:
                    watch.mark(model.get_parameter(full_name(name, parameter)))
        inside.enter_context(following(watch))
        yield


def local_loss_is_right(
    model: nn.Module, batch: Mapping[str, Any], layers: VocabularyLayers
) -> bool:
    """Whether the model decides nothing by its logits before it takes its loss from them."""
    if not knows_loss(model, layers, batch):
        return True
    watch, modes = ValueWatch(), ExitStack()
    (head,) = layers.heads
    entered = False

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal entered
        if not entered:
            entered = True
            modes.enter_context(following(watch))
        watch.mark(output)

    def loss(own: Any) -> Any:
        def of(*args: Any, **kwargs: Any) -> Any:
            with watch.elsewhere():
                return own(*args, **kwargs)

        return of

    handle = model.get_submodule(head).register_forward_hook(after)
    try:
        with (
            torch.no_grad(),
            evaluating(model),
            without_cache(model),
            with_changed_loss(model, loss),
        ):
            model(**batch, labels=batch["input_ids"])
    except Exception:  # whatever the model's code raises
        return False
    finally:
        modes.close()
        handle.remove()
    return not (watch.problem or watch.decided)
