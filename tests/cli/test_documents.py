"""Documents: quoted paths and anchors exist, and each setting has one topic."""

import re
from pathlib import Path

import pytest

from cli.setting_groups import SETTING_GROUPS
from config.settings import Settings
from demo.processes import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
WRITTEN_BY_COMMANDS = {"benchmarks/results/latest.json"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_quoted_paths_exist(page: Path) -> None:
    """A path in backticks that begins with a folder of the repository is a file or a folder."""
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    quoted = re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text())
    assert [path for path in quoted if path not in WRITTEN_BY_COMMANDS and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_anchors_of_links_are_headings(page: Path) -> None:
    """Each anchor is a heading of the page that the link leads to."""
    links = re.findall(r"\]\((?!https?://)([^)#]*\.md|)#([^)]+)\)", page.read_text())
    targets = [(page.parent / target if target else page, anchor) for target, anchor in links]
    assert [(target.name, anchor) for target, anchor in targets if anchor not in _anchors(target)] == []


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_each_setting_has_one_topic() -> None:
    """`cli/setting_groups.py` names it once, with the roles to restart."""
    assert sorted(name for restarts in SETTING_GROUPS.values() for name in restarts) == sorted(Settings.model_fields)
