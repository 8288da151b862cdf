"""Text files: which bytes end a line, and which byte is wrong."""

from __future__ import annotations

import pytest

from colrow.text import decode, lines

INSIDE = "form\ffeed, \x85, \u2028, \u2029, \v, \x1c, lone \r, NUL \0"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"{INSIDE}\nsecond\r\nthird", [INSIDE, "second", "third"]),
        ("\ufeffa\n\nb\n", ["a", "", "b"]),
        ("a\r\r\n", ["a\r"]),
        ("\n", [""]),
        ("", []),
    ],
)
def test_a_line_ends_with_a_newline_alone(content: str, expected: list[str]) -> None:
    assert lines(decode(content.encode(), "text.txt")) == expected


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"ab\n\xffc", r"at byte 3 \(0xff, in line 2\)"),
        (b"\xef\xbb\xbfa\xe2\x82", r"at byte 4 \(0xe2, in line 1\)"),
        ("über".encode("utf-16"), r"at byte 0 \(0xff, in line 1\)"),
    ],
)
def test_what_is_not_utf8_is_named_by_its_byte(content: bytes, place: str) -> None:
    with pytest.raises(ValueError, match=rf"text\.txt is not UTF-8 text: {place}"):
        decode(content, "text.txt")
