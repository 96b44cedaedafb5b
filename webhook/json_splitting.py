"""Split JSON texts by their brackets, without parsing the parts. Pure functions, without I/O.

The parts of a text stay readable although another part of it is invalid. Splitting takes one pass without recursion.
"""

import json
import re
from collections.abc import Iterator

_MARK = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[]["{},]', re.DOTALL)
"""A whole string, a bracket or a comma. A single quote opens a string that is never closed."""
_MEMBER = re.compile(rb'("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\r\n]*+:(.*)', re.DOTALL)
_BLANK = b" \t\r\n"
UNKNOWN_TEXT = "\0"
"""Placeholder for a name or a type that cannot be read. It equals no name or type that payready uses."""
NOT_JSON = (ValueError, RecursionError, ArithmeticError)
"""Errors of the JSON parser: invalid syntax or encoding, too deep, or an exponent out of range."""


class InvalidJson(ValueError):
    """Input that Python's parser accepts, but that is not valid JSON."""


def split_members(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Return the names of an object's members with the bytes of their values, or `UNKNOWN_TEXT` with the whole item."""
    for item in split_items(raw, b"{}"):
        member = _MEMBER.fullmatch(item)
        yield (decode_json_string_or_unknown(member[1]), member[2].strip(_BLANK)) if member else (UNKNOWN_TEXT, item)


def split_items(raw: bytes, brackets: bytes) -> Iterator[bytes]:
    """Return the items between these brackets, split at the commas. Extra commas are ignored."""
    return filter(None, _split(raw, brackets))


def _split(raw: bytes, brackets: bytes) -> Iterator[bytes]:
    """Split in one pass without recursion, so that deep nesting is harmless."""
    raw = raw.strip(_BLANK)
    if raw[:1] + raw[-1:] != brackets:
        raise InvalidJson("a bracket is missing")
    depth, start = 0, 1
    for mark in _MARK.finditer(raw):
        match mark[0]:
            case b'"':
                raise InvalidJson("a text is not closed")
            case b"[" | b"{":
                depth += 1
            case b"]" | b"}":
                depth -= 1
                if depth == 0 and mark.end() != len(raw):
                    raise InvalidJson("something follows the last bracket")
            case b"," if depth == 1:
                yield raw[start : mark.start()].strip(_BLANK)
                start = mark.end()
    if depth:
        raise InvalidJson("a bracket is missing")
    yield raw[start:-1].strip(_BLANK)


def decode_json_string_or_unknown(raw: bytes) -> str:
    """Decode a JSON string, or return `UNKNOWN_TEXT`."""
    try:
        return str(json.loads(raw.decode()))
    except NOT_JSON:
        return UNKNOWN_TEXT
