"""Banned words of the style guide do not occur in tracked source files and documents."""

import re
import subprocess
from pathlib import Path

import pytest

from demo.processes import ROOT

PATTERNS = (
    *("*.py", "*.lua", "*.md", "*.yml", "*.yaml", "*.toml", "Makefile", "Procfile", ".ci/run", "Dockerfile"),
    *("*.html", "*.css", "*.js", "*.svg", "*.mako", "*.sh", "*.ini", "*.pml", "*.json", ".env.example", "deploy/*"),
)
SKIPPED = re.compile(r"(^|/)(requirements[^/]*|test_words\.py|releases/[^/]*\.json)$")  # a saved release is frozen
LISTED = re.compile(r"<!-- banned words -->(.*?)<!-- end of banned words -->", re.DOTALL)


def _listed_words() -> list[str]:
    """Return the words and phrases between the markers in CONTRIBUTING.md."""
    block = LISTED.search((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert block
    return [word.strip(' "\n') for word in block[1].strip().rstrip(".").split(",")]


WORD = re.compile(
    r"(?<![a-z])(?:{})(?![a-z])".format("|".join(_listed_words()).replace(" ", r"[\s#_]+")),
    re.IGNORECASE,
)
"""A part of a snake_case name is a whole word, and a phrase may cross a line break."""

ALLOWED: dict[tuple[str, str], str] = {
    ("CONTRIBUTING.md", "Never *who*, *those* or an indefinite pronoun."): "the rule itself",
    (
        "tests/support/servers.py",
        'SERVER_USER = "nobody" if os.geteuid() == 0 else None',
    ): "the name of a Unix user",
}
"""Exact lines that may have a banned word, by file and stripped line, with the reason."""


def _tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "--", *PATTERNS], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if not SKIPPED.search(name) and (ROOT / name).exists()]


def _hits(name: str, text: str) -> list[str]:
    """Return each banned word as `file:line: word`."""
    if name == "CONTRIBUTING.md":
        text = LISTED.sub(lambda block: "\n" * block[0].count("\n"), text)
    lines = text.splitlines()
    hits = []
    for match in WORD.finditer(text):
        number = text.count("\n", 0, match.start()) + 1
        if (name, lines[number - 1].strip()) not in ALLOWED:
            hits.append(f"{name}:{number}: {' '.join(match[0].split())}")
    return hits


def test_tracked_files_have_no_banned_words() -> None:
    hits = [hit for name in _tracked_files() for hit in _hits(name, Path(ROOT, name).read_text(encoding="utf-8"))]
    assert not hits, f"{len(hits)} banned words, see the style guide in CONTRIBUTING.md:\n" + "\n".join(hits)


def test_each_kind_of_text_of_the_dashboard_is_scanned() -> None:
    kinds = {Path(name).suffix for name in _tracked_files() if name.startswith("dashboard/")}
    assert kinds == {path.suffix for path in (ROOT / "dashboard").rglob("*.*") if path.suffix != ".pyc"}


def test_banned_words_are_found_in_prose_names_and_wrapped_lines() -> None:
    text = "They were Told.\nlock_is_held = 1\n# it is taken\n# in later\n"
    assert _hits("a.py", text) == ["a.py:1: Told", "a.py:2: lock_is_held", "a.py:3: taken # in"]


def test_funds_holds_longer_words_and_the_list_itself_are_allowed() -> None:
    assert (
        _hits("a.py", "a funds hold, FUNDS_HOLD_S, a held amount, the threshold, a placeholder, talent, household")
        == []
    )
    block = "<!-- banned words -->\ntold\n<!-- end of banned words -->\ntold"
    assert _hits("CONTRIBUTING.md", block) == ["CONTRIBUTING.md:4: told"]


def test_allowed_lines_exist_and_have_a_reason() -> None:
    for (name, line), reason in ALLOWED.items():
        assert reason
        assert line in [known.strip() for known in (ROOT / name).read_text(encoding="utf-8").splitlines()]
