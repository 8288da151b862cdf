"""The command line's parser: help in groups, near names for what is misspelt, errors of a line."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from shutil import get_terminal_size
from typing import IO, Any, NoReturn

_WIDEST = 100
_COLOURS = {  # as rich names them, by what is coloured
    "bold": r"(?m)^(?:usage:|[^\s].*:$)",
    "cyan": r"(?<![\w-])--?[a-z][\w-]*",
    "green": r"(?m)^  colrow .*$",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Fills the prose of a description to the terminal's width and leaves indented lines alone."""

    def __init__(self, prog: str) -> None:
        width = min(get_terminal_size().columns, _WIDEST) - 2
        super().__init__(prog, max_help_position=26, width=width)
        self._action_max_length = 15  # a command's name, which argparse does not count in full

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if part.startswith("  ") else textwrap.fill(part, width)
            for part in text.rstrip().split("\n\n")
        )


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line that name what was probably meant.

    ``--help`` leaves out the options that :meth:`rare` names, and ``--help-all`` shows all.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, **options})
        self._positionals.title = "arguments"
        self._rare: set[str] = set()
        self._show_rare = False
        self._words: Sequence[str] = ()

    def rare(self, *destinations: str) -> None:
        """Leaves these options to ``--help-all``, by the names of their values."""
        self._rare.update(destinations)
        self.add_argument(
            "--help-all", action=_HelpAll, nargs=0, help="show the rarely needed options too"
        )

    @property
    def options(self) -> list[str]:
        """Every long option."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but that nothing may be unknown."""
        self._words = sys.argv[1:] if args is None else args
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, []

    def error(self, message: str) -> NoReturn:
        """Says what is wrong in one line, and exits with 2."""
        self.exit(2, f"{self.prog}: {message}{self._meant()} (see {self.prog} --help)\n")

    def _meant(self) -> str:
        known = self.options
        for word in self._words:
            name = word.partition("=")[0]
            if name == "--":
                break
            if name.startswith("--") and not any(each.startswith(name) for each in known):
                return did_you_mean(name, known)
        return ""

    def format_usage(self) -> str:
        """The command's words, without its options one by one."""
        self.usage = self._short_usage()
        return super().format_usage()

    def format_help(self) -> str:
        """The groups in their order, the ungrouped options last."""
        self.usage = self._short_usage()
        self._action_groups.sort(key=lambda group: group is self._optionals)
        hidden = [] if self._show_rare else [a for a in self._actions if a.dest in self._rare]
        helps = [action.help for action in hidden]
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            text = super().format_help()
        finally:
            for action, help in zip(hidden, helps, strict=True):
                action.help = help
        if hidden:
            text += f"\n{len(hidden)} options more: {self.prog} --help-all\n"
        return text

    def _short_usage(self) -> str:
        words = [self.prog]
        for action in self._actions:
            if not action.option_strings:
                name = str(action.metavar or action.dest)
                words.append(f"[{name}]" if action.nargs == "?" else name)
            elif action.required:
                words.append(f"{action.option_strings[0]} {action.metavar or action.dest.upper()}")
        return " ".join([*words, "[options]"]).replace("%", "%%")

    def print_help(self, file: Any = None) -> None:
        """Prints :meth:`format_help`, in colours on a terminal."""
        stream: IO[str] = file or sys.stdout
        if not stream.isatty() or os.environ.get("NO_COLOR"):
            stream.write(self.format_help())
            return
        from rich.console import Console
        from rich.text import Text

        text = Text(self.format_help())
        for style, pattern in _COLOURS.items():
            text.highlight_regex(pattern, style)
        Console(file=stream, highlight=False).print(text, soft_wrap=True, end="")


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        assert isinstance(parser, Parser)
        parser._show_rare = True
        parser.print_help()
        parser.exit()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for names close to this one, else "".

    Close is what is spelt almost so, what has these letters as its words' first ("--lr"), and what
    has one of its words.
    """
    known = list(known)
    words = {word for word in name.strip("-").split("-") if len(word) > 3}
    close = (
        get_close_matches(name, known, n=2, cutoff=0.7)
        or [each for each in known if _initials(each) == name.strip("-")]
        or [each for each in known if words & set(each.strip("-").split("-"))][:3]
        or get_close_matches(name, known, n=2)
    )
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _initials(option: str) -> str:
    return "".join(word[:1] for word in option.strip("-").split("-"))
