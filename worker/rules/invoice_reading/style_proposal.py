"""Propose how values are written: the styles by which all examples can be read."""

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Generic, TypeVar

StyleT = TypeVar("StyleT", bound=StrEnum)


class StyleProposal(Generic[StyleT]):
    """The styles by which all values so far can be read."""

    def __init__(self, styles: Iterable[StyleT], parse: Callable[[StyleT, str], object | None]) -> None:
        """Start with all styles. `parse` returns None for a value that is not written in a style."""
        self.styles = list(styles)
        self.ambiguous_row = 0
        self.ambiguous_text = ""
        """An example that the remaining styles read differently, if there is one."""
        self._parse = parse
        self._seen: set[str] = set()

    def is_decided(self) -> bool:
        """Return whether one style remains."""
        return len(self.styles) == 1

    def narrow(self, row: int, text: str) -> None:
        """Exclude the styles by which this value cannot be read. Ignore a value that no style can read."""
        if self.is_decided() or text in self._seen:
            return
        self._seen.add(text)
        values = {style: value for style in self.styles if (value := self._parse(style, text)) is not None}
        if not values:
            return
        self.styles = list(values)
        if not self.ambiguous_text and len(set(values.values())) > 1:
            self.ambiguous_row, self.ambiguous_text = row, text

    def is_ambiguous(self) -> bool:
        """Return whether the remaining styles read a value differently."""
        return not self.is_decided() and bool(self.ambiguous_text)

    def ambiguity_text(self, option: str) -> str:
        """Return the line, its readings, and the option that decides."""
        readings = " or ".join(str(self._parse(style, self.ambiguous_text)) for style in self.styles)
        choices = " or ".join(f'{option} "{style}"' for style in self.styles)
        return f"line {self.ambiguous_row}: {self.ambiguous_text!r} may be {readings}; give {choices}"
