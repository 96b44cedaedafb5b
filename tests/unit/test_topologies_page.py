"""`docs/reference/topologies.md` names tests: each must exist."""

import re

import pytest

from demo.processes import ROOT

PAGE = (ROOT / "docs" / "reference" / "topologies.md").read_text()
TESTS = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
ALL_TESTS = "\n".join(TESTS.values())


@pytest.mark.parametrize("file", sorted(set(re.findall(r"(test_\w+\.py)", PAGE))))
def test_page_names_files_that_exist(file: str) -> None:
    assert file in TESTS


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b(test_\w+)`", PAGE))))
def test_page_names_tests_that_exist(name: str) -> None:
    assert f"def {name}(" in ALL_TESTS


def test_page_names_every_topology_test_file() -> None:
    assert {path.name for path in (ROOT / "tests" / "topologies").glob("test_*.py")} <= set(
        re.findall(r"test_\w+\.py", PAGE)
    )
