"""The stylesheet is one file that all pages edit: a lost brace would put the rules after it into another rule."""

import ast
import re
from collections.abc import Iterator

from dashboard.page_rendering import FOLDER
from worker.ledger.payment_history import EventKind
from worker.rules.pricing import EntryState

CLASS_ATTRIBUTE = re.compile(r'class="((?:\{\{.*?\}\}|\{%.*?%\}|[^"{])*)"')
CLASSES_OF_STATES = {*EventKind, *(f"bar-{state}" for state in EntryState)}
"""Classes that templates make of a value of the ledger."""


def test_each_block_of_the_stylesheet_is_closed() -> None:
    depth = 0
    for number, line in enumerate((FOLDER / "static" / "style.css").read_text().splitlines(), 1):
        assert not (line.startswith("/*") and depth), f"line {number} begins a part inside of a block"
        depth += line.count("{") - line.count("}")
    assert depth == 0


def _selectors() -> str:
    rules = re.sub(r"/\*.*?\*/", "", (FOLDER / "static" / "style.css").read_text(), flags=re.DOTALL)
    return " ".join(re.findall(r"([^{}]+)\{", rules))


def _words_that_may_be_classes() -> Iterator[str]:
    """Yield the words of class attributes, and those of all texts in the code, which may choose a class."""
    for template in (FOLDER / "templates").glob("*.html"):
        for attribute in CLASS_ATTRIBUTE.findall(template.read_text()):
            yield from re.findall(r"[\w-]+", attribute)
    for text in re.findall(r'"([^"\n]*)"', (FOLDER / "static" / "live.js").read_text()):
        yield from text.split()
    for module in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_each_class_of_the_stylesheet_is_used() -> None:
    classes = set(re.findall(r"\.([a-zA-Z_][\w-]*)", _selectors()))
    assert classes > {"sentence", "gone", "ours", "bar-posted"}
    assert classes - CLASSES_OF_STATES - set(_words_that_may_be_classes()) == set()
