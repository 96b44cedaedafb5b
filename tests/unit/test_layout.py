"""Layout of the repository, and rules for shared files."""

import re
import subprocess

import pytest

from demo.processes import ROOT

FOLDERS = {
    "benchmarks",
    "cli",
    "config",
    "dashboard",
    "demo",
    "deploy",
    "migrations",
    "simulator",
    "tasks",
    "tests",
    "webhook",
    "worker",
}

MAX_MODULE_LINES = 350
NOT_PRODUCTION = ("tests/", "migrations/")


def _tracked_and_new() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_python_files_are_only_in_known_folders() -> None:
    """The import order does not cover a new folder."""
    python = [name for name in _tracked_and_new() if name.endswith(".py")]
    assert {name.split("/")[0] for name in python} == FOLDERS


def test_no_module_has_a_vague_name() -> None:
    """A module's name states what the module does."""
    vague = re.compile(r"(^|/)(utils?|helpers?|common|misc|base|core)(\.py|/)")
    assert [name for name in _tracked_and_new() if vague.search(name)] == []


def test_no_module_has_more_than_350_lines() -> None:
    """A longer module has more than one reason to change."""
    modules = [name for name in _tracked_and_new() if name.endswith(".py") and not name.startswith(NOT_PRODUCTION)]
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in modules}
    assert {name: count for name, count in lines.items() if count > MAX_MODULE_LINES} == {}


def test_file_names_are_unique_in_production_code() -> None:
    """A traceback or a search names one module."""
    names = [
        name.rsplit("/", 1)[-1]
        for name in _tracked_and_new()
        if name.endswith(".py") and not name.startswith(NOT_PRODUCTION)
    ]
    repeated = {name for name in names if names.count(name) > 1}
    assert repeated <= {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_pin_hashes_and_name_no_index(name: str) -> None:
    """The machine that installs packages configures the index."""
    lines = (ROOT / name).read_text().splitlines()
    assert [
        line for line in lines if re.match(r"\s*(-i|-f|--(extra-)?index-url|--find-links|--trusted-host)", line)
    ] == []
    assert [line for line in lines if "://" in line] == []
    pinned = [line for line in lines if re.match(r"[A-Za-z0-9]", line)]
    assert pinned
    assert [line for line in pinned if not re.match(r"\S+==\S+ (; .+ )?\\$", line)] == []
    assert sum("--hash=sha256:" in line for line in lines) >= len(pinned)


def test_development_requirements_pin_the_production_versions() -> None:
    names = [
        dict(re.findall(r"^(\S+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE))
        for name in ("requirements.txt", "requirements-dev.txt")
    ]
    assert names[0].items() <= names[1].items()
