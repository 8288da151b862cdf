"""The main job on a real model: split it over two ranks, ask it something, prove it right.

    python examples/demo.py MODEL [--tp N]

MODEL is a checkpoint with a chat template, such as SmolLM2-135M-Instruct, whose 9 query heads and
3 KV heads do not divide by 2. Look for three things: the answer's tokens are those of the unsplit
model, each rank holds about half of the weights, and every gradient agrees.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from colrow.cli import main as colrow

QUESTION = "What is the capital of France?"
console = Console(highlight=False)


def unsplit_tokens(model: str, count: int) -> list[int]:
    """The same question to transformers' model in this process, greedily."""
    import torch

    from colrow.generation.tokenizer import encode_prompt, load_tokenizer
    from colrow.verification.reference import load_reference

    prompt = torch.tensor([encode_prompt(load_tokenizer(model), QUESTION)])
    reference = load_reference(model, torch.float32)
    with torch.inference_mode():
        generated = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=count,
            pad_token_id=0,
        )
    tokens: list[int] = generated[0, prompt.shape[1] :].tolist()
    return tokens


def main() -> int:
    """Generates, compares, verifies; 0 when everything holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tp", type=int, default=2)
    args = parser.parse_args()
    size = str(args.tp)

    console.print(f"Model: {Path(args.model).stem}")
    console.rule(f"1. {size} ranks answer: {QUESTION}")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "answer.json"
        command = ["generate", args.model, QUESTION, "--tp", size, "--weights", "fp32"]
        command += ["--max-new-tokens", "40"]
        code = colrow([*command, "--json", str(file)])
        if code != 0:
            return code
        answer = json.loads(file.read_text())

    console.rule("2. The unsplit model (transformers, one process) says")
    expected = unsplit_tokens(args.model, len(answer["token_ids"]))
    same = answer["token_ids"] == expected
    verdict = "the same tokens" if same else f"other tokens: {expected}"
    console.print(f"{answer['token_ids']}\n{len(expected)} tokens: [bold]{verdict}[/]")

    console.rule("3. Logits, loss and every gradient, split against unsplit")
    code = colrow(["verify", args.model, "--tp", size])
    return code if same else 1


if __name__ == "__main__":
    sys.exit(main())
