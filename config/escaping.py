"""Escape text from outside before it is printed or logged as text."""


def escape_unprintable(text: str, *, keep: str = "") -> str:
    r"""Replace each character that is not printable, such as a line break or an escape sequence's first, by `\n` or so.

    A terminal obeys such characters, and a line break forges a line of a log. Characters of `keep` stay.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )
