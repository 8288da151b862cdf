"""The command: ``python -m tests.fuzz``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.status import Status

from tests.fuzz.campaign import Finding, Result, fuzz
from tests.fuzz.case import Case
from tests.fuzz.kinds import KINDS
from tests.fuzz.pool import SECONDS_PER_CASE, Verdict

_WORDS = ("right", "refused", "not run", "wrong")
_SECONDS_BETWEEN_LINES = 10.0
_SENTENCES = 6  # of a finding that are shown


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 when something is wrong; 2 for bad usage."""
    options = _parser().parse_args(arguments)
    try:
        kinds, number, case = _chosen(options.only, options.case)
        if options.ranks < 2 or options.seconds <= 0:
            raise ValueError("--ranks starts at 2 and --seconds above 0")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    console = Console(highlight=False, soft_wrap=True)
    shown = Progress(console, verbose=options.verbose)
    result = fuzz(
        options.ranks,
        options.seed,
        options.seconds,
        kinds,
        number=number,
        case=case,
        shrink=not options.no_shrink,
        stop_at_first=options.first,
        seconds_per_case=options.seconds_per_case,
        progress=shown.case,
        found=shown.finding,
    )
    shown.end(result)
    if options.json:
        options.json.write_text(json.dumps(result.as_dict(), indent=1), encoding="utf-8")
    return 1 if result.findings else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Draws random models, layouts and batches, splits them over real ranks, and "
        "compares values, losses and gradients with the unsplit model in fp64. A refusal must be "
        "a clear sentence of colrow's own. Prints every case that is wrong, made small, with the "
        "command that runs it alone.",
        epilog="kinds: " + ", ".join(KINDS),
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument(
        "--only",
        metavar="KIND[:NUMBER]",
        help="cases of one kind or several (a,b), or one case: decoder:12",
    )
    parser.add_argument(
        "--case", metavar="KIND:JSON", help="this case, as a finding prints it, and no other"
    )
    parser.add_argument("--no-shrink", action="store_true", help="leave what is wrong as drawn")
    parser.add_argument("--first", action="store_true", help="stop at the first that is wrong")
    parser.add_argument("--seconds-per-case", type=float, default=SECONDS_PER_CASE, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--verbose", action="store_true", help="a line for every case")
    return parser


def _chosen(only: str | None, case: str | None) -> tuple[list[str], int | None, Case | None]:
    """The kinds, the number of one case, and the one case itself."""
    name, _, rest = (case or only or "").partition(":")
    names = name.split(",") if name else list(KINDS)
    if unknown := [n for n in names if n not in KINDS]:
        raise ValueError(f"there is no kind {unknown[0]!r}: the kinds are {', '.join(KINDS)}")
    if len(names) > 1 and rest:
        raise ValueError(f"{only!r}: one kind has one number, as in decoder:12")
    if case:
        try:
            return names, None, json.loads(rest)
        except ValueError as error:
            raise ValueError(f"--case takes KIND:JSON, and this is not JSON: {error}") from None
    if rest and not rest.isdigit():
        raise ValueError(f"{only!r}: a case's number is one from 0, as in decoder:12")
    return names, int(rest) if rest else None, None


class Progress:
    """Shows a line that changes on a terminal, elsewhere one every ten seconds."""

    def __init__(self, console: Console, *, verbose: bool) -> None:
        self._console, self._verbose = console, verbose
        self._status: Status | None = None
        self._shown = time.monotonic()
        if console.is_terminal:
            self._status = console.status("starting the ranks")
            self._status.start()

    def case(self, kind: str, number: int, verdict: Verdict, result: Result) -> None:
        """One more case is over."""
        if self._verbose:
            why = f": {'; '.join(verdict.why)[:300]}" if verdict.why else ""
            self._console.print(f"{kind}:{number} {verdict.word}{why}", markup=False)
        line = f"{result.seconds:.0f} s, {_line(result)}; last {kind}:{number}"
        if self._status is not None:
            self._status.update(line)
        elif time.monotonic() - self._shown > _SECONDS_BETWEEN_LINES and not self._verbose:
            self._shown = time.monotonic()
            self._console.print(line, markup=False)

    def finding(self, finding: Finding) -> None:
        """A case is wrong."""
        lines = [
            f"WRONG {finding.kind}:{finding.number}",
            *(f"  {why}" for why in _first(finding.why)),
            f"  again: {finding.again}",
            *(f"  smallest: {why}" for why in _first(finding.why_smallest)),
            f"  again: {finding.again_smallest}",
        ]
        if finding.traceback:
            lines += [f"  | {line}" for line in finding.traceback.splitlines()[-12:]]
        self._console.print("\n".join(lines), markup=False)

    def end(self, result: Result) -> None:
        """A line for each kind, and one for all."""
        if self._status is not None:
            self._status.stop()
        lines = [f"{kind:<14}{_words(count)}" for kind, count in sorted(result.counts.items())]
        self._console.print("\n".join([*lines, f"{'all':<14}{_line(result)}"]), markup=False)


def _first(sentences: list[str]) -> list[str]:
    more = len(sentences) - _SENTENCES
    return sentences[:_SENTENCES] + ([f"and {more} more"] if more > 0 else [])


def _line(result: Result) -> str:
    cases = result.total.total()
    return f"{cases} cases ({cases / max(result.seconds, 1e-9):.1f}/s): {_words(result.total)}"


def _words(count: dict[str, int]) -> str:
    return ", ".join(f"{count.get(word, 0)} {word}" for word in _WORDS)


if __name__ == "__main__":
    sys.exit(main())
