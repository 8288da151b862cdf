"""The ``colrow`` command: one module of this package per subcommand.

A command's module has ``HELP`` (a line), ``DESCRIPTION`` (its ``--help``),
``add_arguments(parser)`` and ``run(args) -> int``, the exit code. It imports torch only inside
``run``, so that ``--help`` and bad usage answer at once.
"""

# ruff: noqa: E402  (an interrupt may come while the rest is imported)

from __future__ import annotations

import signal

# Until there is somebody to catch it, an interrupt ends the process, without a traceback.
_INTERRUPT = signal.getsignal(signal.SIGINT)
if _INTERRUPT is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import pkgutil
import sys
import threading
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import Protocol, cast

from colrow.cli.parser import Parser, did_you_mean
from colrow.launch import BAD_INPUT, RankFailure, debugging, error_message

if _INTERRUPT is signal.default_int_handler:
    signal.signal(signal.SIGINT, _INTERRUPT)

_NOT_COMMANDS = {
    *("__main__", "common", "parser", "bench_model", "bench_pipeline", "verify_quantised"),
}


class Command(Protocol):
    """What a module of this package offers to be a subcommand."""

    HELP: str
    DESCRIPTION: str

    def add_arguments(self, parser: Parser) -> None:
        """Declares the command's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Does the work; 0, or 1 when what was checked does not hold."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments, without the program's name; by default the process's.

    Returns:
        0; 1 when what the command checked does not hold or a rank failed; 2 when the input is
        bad; 130 when it was interrupted.
    """
    if argv is not None:
        return _run(list(argv))
    try:
        return _run(sys.argv[1:])
    finally:
        # The interpreter's end has nobody who would catch an interrupt either.
        if threading.current_thread() is threading.main_thread() and (
            signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(argv: list[str]) -> int:
    try:
        return _run_command(argv)
    except KeyboardInterrupt:
        return 130


def _run_command(argv: list[str]) -> int:
    try:
        parser = _parser(argv)
        if not argv:
            parser.print_help()
            return 0
        args = parser.parse_args(argv)
    except SystemExit as stop:  # --help, --version and bad usage, which have said why
        return stop.code if isinstance(stop.code, int) else 0
    try:
        code = _command(args.command).run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RankFailure as failure:
        if debugging():
            print(failure.traceback, file=sys.stderr)
        message = failure.message if failure.bad_input else str(failure)
        return _fail(args.command, message, code=2 if failure.bad_input else 1)
    except BAD_INPUT as error:
        if debugging():
            raise
        return _fail(args.command, error_message(error), code=2)


def _fail(command: str, message: str, *, code: int) -> int:
    line = " ".join(message.split())
    # A message repeats what files say, and a terminal obeys some characters.
    plain = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)
    print(f"colrow {command}: {plain}", file=sys.stderr)
    return code


def _parser(argv: Sequence[str]) -> Parser:
    """The parser, with the one command that is called for, or with all to choose from."""
    parser = Parser(
        prog="colrow",
        description="Splits a transformer over several devices, by the columns and rows of its "
        "weights, and gives the numbers that one device would give.",
        epilog="Each command starts its own ranks (--tp 2 is enough) and also runs under "
        "torchrun, mpiexec and srun. COLROW_DEBUG=1 shows tracebacks.",
    )
    parser.add_argument("--version", action="version", version=f"colrow {_version()}")
    subparsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title="commands"
    )
    names = sorted(
        module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_COMMANDS
    )
    wanted = next((word for word in argv if not word.startswith("-")), None)
    if wanted is not None and wanted not in names:
        meant = did_you_mean(wanted, names) or f"; there are {', '.join(names)}"
        parser.error(f"there is no command {wanted!r}{meant}")
    for name in names if wanted is None else [wanted]:
        command = _command(name)
        subparser = subparsers.add_parser(
            name,
            help=command.HELP,
            description=command.DESCRIPTION,
        )
        command.add_arguments(subparser)
    return parser


def _command(name: str) -> Command:
    return cast(Command, import_module(f"{__name__}.{name}"))


def _version() -> str:
    try:
        return metadata.version("colrow")
    except metadata.PackageNotFoundError:
        return "(not installed)"
