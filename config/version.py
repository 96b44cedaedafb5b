"""The version of payready."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def payready_version() -> str:
    """Return payready's version. In the image payready is no installed package, so `pyproject.toml` states it."""
    try:
        return version("payready")
    except PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        return str(project["version"])
