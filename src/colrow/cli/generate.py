"""``colrow generate``: streams a model's answer."""

from __future__ import annotations

import argparse
import pickle
import sys
from typing import TYPE_CHECKING, cast

from colrow.cli.common import (
    DTYPES,
    Options,
    add_device,
    add_engine,
    add_in_place,
    add_json,
    add_pipeline,
    add_tensor_split,
    add_tp,
    positive_int,
    run_on_ranks,
    write_json,
)
from colrow.cli.parser import Parser
from colrow.files import read_input
from colrow.generation.sampling_settings import Sampling
from colrow.launch import RankFailure, rank_environment
from colrow.models.families import families
from colrow.progress import Progress
from colrow.text import decode, lines

if TYPE_CHECKING:
    from colrow.generation.answer import Request

HELP = "stream a model's answer to a prompt"
DESCRIPTION = f"""\
Generates text with a model that is split over N ranks, and prints it as it comes. A prompt is a
message in a chat where the model has a chat template, and is continued where it has none.

  colrow generate model.gguf "Why is the sky blue?" --tp 2
  colrow generate ./Llama-3-8B - --tp 4 --temperature 0.7 < question.txt
  colrow generate ./Llama-3-8B "Hello" --pp 2 --layer-split 20,12 --tp 2
  colrow generate runs/1 "Once upon a time" --no-chat
  colrow generate model.gguf --prompts questions.txt --pp 2 --json -

The text goes to standard output, a line of statistics to standard error. No rank ever holds the
logits of the whole vocabulary, and all ranks choose the same token without being told by one.

MODEL may be any causal language model. The decoder runs those of the families that colrow describes
({", ".join(sorted(families()))}; of most of them GGUF files too) and the training runs of colrow
train. Every other one is transformers' own, split in place, with the cache that its class wants,
for directories with safetensors and --tp alone. The line of statistics and the JSON say which of
the two ran.

With --pp the layers are divided over stages, and several prompts (--prompts) keep all of them busy:
while one stage works on some prompts, the next works on others.

JSON (--json): text, token_ids, finish_reason ("stop" at an end-of-sequence token, "length" at
--max-new-tokens or the end of the context), tokens_per_second (after the first token),
time_to_first_token_seconds (the prompt's forward pass), load_seconds, weight_bytes_per_rank and
cache_bytes_per_rank (a list, by rank, tp innermost), prompt_tokens, model, architecture, kind
("decoder" or "in place"), tp, pp, tensor_split, layers_per_stage (null in place), dtype (of the
activations), weights ("quantised" or a dtype), weight_types (of quantised blocks), device, engine,
sampling. With --prompts text, token_ids, finish_reason and prompt_tokens are in answers, a list
with one object for each prompt.
"""


def add_arguments(parser: Parser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a Hugging Face directory, a hub id in the local cache, a .gguf file, or the --output "
        "of colrow train",
    )
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help='the prompt; "-" reads it from standard input'
    )
    _add_prompts(parser.add_argument_group("prompt"))
    _add_answer(parser.add_argument_group("answer"))
    ranks = parser.add_argument_group("ranks")
    add_tp(ranks)
    add_pipeline(ranks)
    add_tensor_split(ranks)
    ranks.add_argument(
        "--weights",
        "--dtype",
        choices=("auto", "quantised", *DTYPES),
        default="auto",
        metavar="FORMAT",
        help="what the weights are kept as: quantised, in the blocks of a GGUF file, whose kernels "
        "the extra colrow[quantised] brings; or numbers of a dtype (fp32, fp64, bf16, fp16), in "
        "which the model then computes. auto: quantised on CPUs where the file is, else bf16 on "
        "CUDA and fp32 on CPUs (default auto)",
    )
    add_device(ranks)
    add_engine(ranks)
    add_in_place(parser.add_argument_group("model"))
    output = parser.add_argument_group("output")
    add_json(output)
    output.add_argument("--quiet", action="store_true", help="print no line of statistics")
    parser.rare("layer_split", "tensor_split", "engine", "in_place", "trust_remote_code")


def _add_prompts(group: Options) -> None:
    group.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="answer each line of the file, which is a prompt of its own, all of them together; "
        "the answers come in the file's order, and an empty line is an error",
    )
    group.add_argument("--system", metavar="TEXT", help="the system message of the chat")
    group.add_argument(
        "--no-chat",
        action="store_true",
        help="continue the prompt as it is, although the model has a chat template",
    )


def _add_answer(group: Options) -> None:
    group.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=256,
        metavar="N",
        help="stop after N tokens at the latest (default 256)",
    )
    defaults = Sampling()
    group.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        metavar="T",
        help="0 always takes the most likely token; above, tokens are drawn with their "
        "probabilities at this temperature: 0.7 is lively, 1 the model's own (default 0)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=defaults.top_k,
        metavar="K",
        help="draw from the K most likely tokens only; 0 for all (default 0)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=defaults.top_p,
        metavar="P",
        help="draw from the fewest most likely tokens that have probability P together; 1 for all "
        "(default 1)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        metavar="S",
        help="of the draws; the same seed gives the same tokens at every --tp (default 0)",
    )


def run(args: argparse.Namespace) -> int:
    """Checks all that can be checked here, then generates on the ranks."""
    first = (environment := rank_environment()) is None or environment.rank == 0
    with Progress(f"reading {args.model}", active=first):
        request = _request(args, _prompts(args))

    from colrow.generation.answer import answer

    try:
        result = run_on_ranks(answer, request, ranks=args.tp * args.pp)
    except RankFailure as failure:
        if failure.error_type == "BrokenPipeError":  # the reader of a pipe has seen enough
            raise BrokenPipeError from None
        raise
    if result is None:  # not rank 0
        return 0
    if not args.quiet and args.json != "-":
        print(_statistics(result), file=sys.stderr)
    if args.json:
        write_json(result, args.json)
    return 0


def _request(args: argparse.Namespace, prompts: list[str]) -> Request:
    """What the ranks are asked to do.

    Raises:
        ValueError: what they could not do.
    """
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)

    from colrow.any_model.loading import describe_model
    from colrow.checkpoint.run_directory import model_files
    from colrow.generation.answer import Request
    from colrow.generation.template import RENDERER
    from colrow.generation.tokenizer import encode_prompt, end_tokens, load_tokenizer

    known = describe_model(
        args.model,
        tp=args.tp,
        pp=args.pp,
        in_place=args.in_place,
        tensor_split=args.tensor_split,
        layer_split=args.layer_split,
        trust_remote_code=args.trust_remote_code,
    )
    files = model_files(args.model)
    tokenizer = load_tokenizer(files)
    tokens = [
        encode_prompt(tokenizer, prompt, system=args.system, chat=not args.no_chat)
        for prompt in prompts
    ]
    RENDERER.close()
    largest = max(max(prompt, default=0) for prompt in tokens)
    if largest >= known.vocab_size:
        raise ValueError(
            f"the prompt has token {largest}, and the model's vocabulary ends at "
            f"{known.vocab_size - 1}: tokenizer and weights do not belong together"
        )
    longest = max(len(prompt) for prompt in tokens)
    room = args.max_new_tokens if known.max_positions is None else known.max_positions - longest
    if room < 1:
        raise ValueError(
            f"the prompt has {longest} tokens and the model's context {known.max_positions}: "
            "there is no room for an answer; shorten the prompt"
        )
    return Request(
        model=args.model,
        prompts=tuple(tuple(prompt) for prompt in tokens),
        tokenizer=pickle.dumps(tokenizer),
        max_new_tokens=min(args.max_new_tokens, room),
        sampling=sampling,
        eos_token_ids=end_tokens(files, known.eos_token_ids, tokenizer),
        tp=args.tp,
        pp=args.pp,
        layer_split=args.layer_split,
        tensor_split=args.tensor_split,
        in_place=args.in_place,
        trust_remote_code=args.trust_remote_code,
        weights=DTYPES.get(args.weights, args.weights),
        device=args.device,
        engine=args.engine,
        listed=args.prompts is not None,
        stream=args.json != "-",
    )


def _prompts(args: argparse.Namespace) -> list[str]:
    if [args.prompt, args.prompt_file, args.prompts].count(None) != 2:
        raise ValueError("give either PROMPT or --prompt-file or --prompts")
    if args.prompts is not None:
        prompts = lines(decode(read_input(args.prompts), args.prompts))
        if not prompts:
            raise ValueError(f"{args.prompts} has no prompt: each line of it should be one")
        for number, prompt in enumerate(prompts, 1):
            if not prompt.strip():
                raise ValueError(
                    f"line {number} of {args.prompts} is empty: each line should be a prompt, and "
                    "has an answer of its own; take the empty lines out"
                )
        return prompts
    if args.prompt_file is not None:
        prompt = decode(read_input(args.prompt_file), args.prompt_file)
    elif args.prompt == "-":
        ranks = rank_environment()
        if ranks is not None and ranks.world_size > 1:
            raise ValueError(
                f"the ranks of {ranks.launcher} share one standard input: use --prompt-file"
            )
        stream = getattr(sys.stdin, "buffer", None)  # a text stream may stand in for it
        prompt = decode(stream.read(), "standard input") if stream else sys.stdin.read()
    else:
        prompt = str(args.prompt)
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return [prompt.replace("\r\n", "\n")]


def _statistics(result: dict[str, object]) -> str:
    answers = cast(list[dict[str, list[int]]], result.get("answers", [result]))
    tokens = sum(len(answer["token_ids"]) for answer in answers)
    megabytes = [f"{size / 1e6:.0f}" for size in cast(list[int], result["weight_bytes_per_rank"])]
    layers = cast(list[int], result["layers_per_stage"] or [])
    types = ", ".join(cast(list[str], result["weight_types"]))
    kind = "" if result["kind"] == "decoder" else ", split in place"
    return (
        f"{result['architecture']}{kind}: "
        f"{tokens} tokens, {result['tokens_per_second']:.1f} tokens/s, first token after "
        f"{result['time_to_first_token_seconds']:.2f} s, {types or result['dtype']} weights "
        f"{' + '.join(megabytes)} MB on {len(megabytes)} rank{'s' if len(megabytes) > 1 else ''}"
        + (f", layers {' + '.join(map(str, layers))}" if len(layers) > 1 else "")
        + (f", engine {result['engine']}" if len(megabytes) > 1 else "")
    )
