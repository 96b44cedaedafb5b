"""Build backend of pyproject.toml: setuptools for an editable install of a checkout, and a refusal of packages.

docs/decisions/0015-run-from-a-checkout-or-the-image.md has the reason.
"""

from typing import Any, NoReturn

from setuptools.build_meta import build_editable, get_requires_for_build_editable, prepare_metadata_for_build_editable

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "prepare_metadata_for_build_editable",
]
REFUSAL = (
    "payready cannot be built as a package: run it from a checkout, with `make setup` or `pip install --editable .`, "
    "or from its image."
)


def build_wheel(*_arguments: Any, **_options: Any) -> NoReturn:
    """Refuse: the wheel would install packages named `config`, `tasks` and `worker`."""
    raise SystemExit(REFUSAL)


def build_sdist(*_arguments: Any, **_options: Any) -> NoReturn:
    """Refuse: a source distribution serves only to build a wheel."""
    raise SystemExit(REFUSAL)
