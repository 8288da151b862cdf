"""What ``colrow plan`` does with its arguments."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from colrow.planner.arguments import (
    given_sizes,
    hardware_of,
    layout_of,
    layout_sizes,
    model_of,
    numbers_of,
)
from colrow.planner.cost import cost
from colrow.planner.explain import explain, explain_serving
from colrow.planner.hardware import Hardware
from colrow.planner.inference import predict_serving
from colrow.planner.model import ModelShape
from colrow.planner.predict import Prediction, predict
from colrow.planner.reasons import what_loses, why_first
from colrow.planner.recommend import recommend, scaling, smallest_change
from colrow.planner.serving import Serving
from colrow.planner.serving_search import recommend_serving
from colrow.planner.tables import (
    show_cost,
    show_model,
    show_nothing_fits,
    show_prediction,
    show_recommendation,
    show_serving,
    show_splits,
    show_users,
)
from colrow.planner.unequal import split_unequal
from colrow.planner.users import USER_VALUES, Users, most_users, predict_users

# Options of training with defaults that say no.
OF_TRAINING = ("lora_rank", "frozen", "offload_layers")
DEFAULT_PROMPT = 1024
SEQUENCES_PER_DEVICE = 2
# Options of one layout, which a search chooses itself.
OF_ONE_LAYOUT = (
    "microbatch",
    "virtual_stages",
    "sequence_parallel",
    "recompute",
    "schedule",
    "zero",
    "stage_layers",
    "ep",
)


def plan(
    args: Namespace, console: Console, *, measured: Hardware | None = None
) -> tuple[bool, object]:
    """Evaluates or searches; prints to ``console``.

    Args:
        args: of ``colrow plan``.
        measured: this machine, in place of the one that ``args`` names.

    Returns:
        Whether something fits, and the result as plain values.
    """
    model, hardware = model_of(args), hardware_of(args, measured)
    if args.gpus is not None and args.gpus < 1:
        raise ValueError(f"--gpus {args.gpus}: at least 1 device is needed")
    unequal = args.device_memory or args.tensor_split
    if (args.plot or args.html) and (args.inference or unequal):
        option = "--plot" if args.plot else "--html"
        raise ValueError(
            f"{option} draws training layouts; use --json for the numbers of generation"
        )
    if args.explain and unequal:
        raise ValueError("--explain covers equal devices; the table of unequal ones says it all")
    if args.inference or unequal:
        of_training = [
            *(
                n
                for n in (*OF_ONE_LAYOUT, "global_batch", "sequence")
                if getattr(args, n) is not None
            ),
            *(n for n in OF_TRAINING if getattr(args, n)),
        ]
        if of_training:
            option = of_training[0].replace("_", "-")
            raise ValueError(f"--{option} is about training; leave it out for generation")
    if unequal:
        if not args.inference:
            console.print("Unequal devices are planned for generation, as with --inference.")
        return _unequal(args, model, hardware, console)
    if args.inference:
        return _inference(args, model, hardware, console)
    if given_sizes(args):
        return _evaluate(args, model, hardware, console)
    return _search(args, model, hardware, console)


def _evaluate(
    args: Namespace, model: ModelShape, hardware: Hardware, console: Console
) -> tuple[bool, object]:

    sizes = layout_sizes(args)
    schedule = args.schedule or ("interleaved" if (args.virtual_stages or 1) > 1 else "1f1b")
    layout = layout_of(
        args,
        model,
        **sizes,
        microbatch=1 if args.microbatch is None else args.microbatch,
        global_batch=args.global_batch,
        sequence_parallel=bool(args.sequence_parallel) and sizes["tp"] > 1,
        recompute=args.recompute or "none",
        schedule=schedule,
        virtual_stages=1 if args.virtual_stages is None else args.virtual_stages,
        zero=args.zero or 0,
        ep=args.ep or 1,
        stage_layers=tuple(int(n) for n in numbers_of("--stage-layers", args.stage_layers)),
    )
    prediction = predict(model, layout, hardware)
    show_model(console, model, hardware.name, layout.devices)
    show_prediction(console, prediction)
    if args.explain:
        console.print("\n" + explain(prediction), markup=False, soft_wrap=True)
    _draw(args, [prediction], [prediction], model, hardware)
    costs = _cost(args, hardware, layout.devices, prediction.tokens_per_second, console)
    return prediction.fits, prediction.as_dict() | costs


def _search(
    args: Namespace, model: ModelShape, hardware: Hardware, console: Console
) -> tuple[bool, object]:

    pinned = [name for name in OF_ONE_LAYOUT if getattr(args, name) is not None]
    if pinned:
        option = "--" + pinned[0].replace("_", "-")
        raise ValueError(
            f"{option} belongs to one layout: give its --tp, --pp or --dp too, or leave {option} "
            "to the search"
        )
    devices = args.gpus or 1
    batch = args.global_batch
    base = layout_of(
        args,
        model,
        global_batch=SEQUENCES_PER_DEVICE * devices if batch is None else batch,
    )
    found = recommend(model, hardware, devices, base, keep=max(1, args.top))
    show_model(console, model, hardware.name, devices)
    if not found.best:
        changes = smallest_change(model, hardware, devices, base)
        show_nothing_fits(console, found, changes)
        nearest = found.nearest.as_dict() if found.nearest else None
        return False, {"best": [], "nearest": nearest, "what_would_fit": changes}
    show_recommendation(console, found)
    first, *others = found.best
    if args.explain:
        console.print("\n" + explain(first), markup=False, soft_wrap=True)
    _draw(args, found.best, found.fitting, model, hardware)
    return True, _cost(args, hardware, devices, first.tokens_per_second, console) | {
        "best": [p.as_dict() for p in found.best],
        "why": why_first(first),
        "why_not": [what_loses(first, other) for other in others],
        "considered": found.considered,
        "do_not_fit": found.rejected,
    }


def _serving(args: Namespace, model: ModelShape) -> Serving:

    prompt = args.prompt
    if prompt is None:
        prompt = max(1, min(DEFAULT_PROMPT, model.config.max_positions - args.new_tokens))
    return Serving(
        batch=args.batch,
        prompt=prompt,
        new_tokens=args.new_tokens,
        weights=args.weights,
        kv_cache=args.kv_cache,
    )


def _inference(
    args: Namespace, model: ModelShape, hardware: Hardware, console: Console
) -> tuple[bool, object]:

    serving = _serving(args, model)
    notes: list[str] = []
    if given_sizes(args):
        sizes = layout_sizes(args)
        chosen = replace(serving, tp=sizes["tp"], pp=sizes["pp"], dp=sizes["dp"])
        prediction = predict_serving(model, chosen, hardware)
    else:
        prediction, notes = recommend_serving(model, hardware, args.gpus, serving)
    show_model(console, model, hardware.name, prediction.serving.devices)
    show_serving(console, prediction)
    for note in notes:
        console.print(note)
    if args.explain:
        console.print("\n" + explain_serving(prediction), markup=False, soft_wrap=True)
    speed, more = prediction.tokens_per_second, {}
    if args.users is not None or args.token_ms is not None:
        found = _users(args, model, prediction.serving, hardware)
        show_users(console, found, args.token_ms)
        if found is None:
            return False, prediction.as_dict() | {"notes": notes, "users": None}
        speed = found.tokens_per_second * prediction.serving.dp
        values = {name: getattr(found, name) for name in USER_VALUES}
        more = {"users": values}
    costs = _cost(args, hardware, prediction.serving.devices, speed, console)
    return prediction.fits, prediction.as_dict() | {"notes": notes} | more | costs


def _users(
    args: Namespace, model: ModelShape, serving: Serving, hardware: Hardware
) -> Users | None:
    if args.users is not None and args.token_ms is not None:
        raise ValueError(
            "--users gives the time between tokens, --token-ms the users: leave one out"
        )
    if args.users is not None:
        return predict_users(model, serving, hardware, args.users)
    return most_users(model, serving, hardware, args.token_ms / 1e3)


def _cost(
    args: Namespace, hardware: Hardware, devices: int, tokens_per_second: float, console: Console
) -> dict[str, object]:
    """Shown and returned when a price, a power or a number of tokens was given."""
    if args.price is None and args.watts is None and args.tokens is None:
        return {}
    found = cost(
        devices,
        tokens_per_second,
        price_per_hour=args.price,
        watts=hardware.device.watts if args.watts is None else args.watts,
        tokens=args.tokens,
    )
    show_cost(console, found)
    return {"cost": asdict(found)}


def _unequal(
    args: Namespace, model: ModelShape, hardware: Hardware, console: Console
) -> tuple[bool, object]:

    shares = numbers_of("--tensor-split", args.tensor_split)
    memory = [gigabytes * 1e9 for gigabytes in numbers_of("--device-memory", args.device_memory)]
    memory = memory or [hardware.device.memory_bytes] * len(shares)
    splits = split_unequal(model, _serving(args, model), hardware, memory, shares)
    name = "devices of " + ", ".join(f"{size / 1e9:g}" for size in memory) + " GB"
    show_model(console, model, name, len(memory))
    show_splits(console, splits)
    return any(split.fits for split in splits), [split.as_dict() for split in splits]


def _draw(
    args: Namespace,
    predictions: Sequence[Prediction],
    considered: Sequence[Prediction],
    model: ModelShape,
    hardware: Hardware,
) -> None:
    if args.html:
        from colrow.planner.page import write_page

        write_page(args.html, predictions, considered, model=model, hardware=hardware)
    if not args.plot:
        return

    from colrow.planner.plots import plot_memory, plot_scaling, plot_time

    folder = Path(args.plot)
    folder.mkdir(parents=True, exist_ok=True)
    plot_memory(predictions[0], folder / "memory.png")
    plot_time(predictions, folder / "time.png")
    plot_scaling(scaling(model, hardware, predictions[0]), folder / "scaling.png")
