"""Text of files as it is: UTF-8, and a line ends with ``\\n`` or ``\\r\\n`` and with nothing else.

``str.splitlines`` also cuts at form feeds, U+0085 and U+2028, and Python's text mode turns a lone
carriage return into a newline; both would give a text other lines than its writer did.
"""

from __future__ import annotations

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def decode(content: bytes, source: str, *, first: int = 0, line: int = 1) -> str:
    """The text of some bytes of a file, without a byte order mark at the file's beginning.

    Args:
        source: the file, for messages.
        first: where they begin in the file, in bytes.
        line: the number of the line that they begin with.

    Raises:
        ValueError: they are not UTF-8; names the byte and its line.
    """
    mark = len(BYTE_ORDER_MARK) if first == 0 and content.startswith(BYTE_ORDER_MARK) else 0
    try:
        return content[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = mark + error.start
        line += content.count(b"\n", 0, wrong)
        raise ValueError(
            f"{source} is not UTF-8 text: at byte {first + wrong} (0x{content[wrong]:02x}, in line "
            f"{line}) no character begins; save it as UTF-8"
        ) from error


def lines(text: str) -> list[str]:
    """The lines of a text, without their ends; a newline at the end of the text begins no line."""
    found = text.split("\n")
    if not found[-1]:
        found.pop()
    return [line.removesuffix("\r") for line in found]


def bytes_text(size: float) -> str:
    """A number of bytes as a person reads it."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
