"""Docstrings of a class's attributes, for generated documents.

pydantic can read them too, but in each process that imports a model: for the settings in 20 ms of CPU.
"""

import ast
import inspect
from collections.abc import Mapping
from functools import cache

from config.settings import Settings


def attribute_docstrings(node: ast.ClassDef) -> Mapping[str, str]:
    """Return the text below each annotated attribute of a class, without line breaks."""
    return {
        before.target.id: " ".join(after.value.value.split())
        for before, after in zip(node.body, node.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }


@cache
def setting_docstrings() -> Mapping[str, str]:
    """Return the meaning of each setting."""
    texts = dict[str, str]()
    for model in reversed(Settings.__mro__):
        if model.__module__.startswith("config."):
            (node,) = ast.parse(inspect.getsource(model)).body
            texts |= attribute_docstrings(node) if isinstance(node, ast.ClassDef) else {}
    return texts
