"""Documents agree with the code."""

import re
from pathlib import Path

import pytest

from cli.attribute_docstrings import setting_docstrings
from cli.generated_docs import generated_files, state_diagram
from cli.log_event_meanings import COMPUTED_EVENTS, LOG_EVENT_MEANINGS
from cli.reference_pages import _events_of, log_events, schema_page
from cli.setting_groups import SETTING_GROUPS
from config.setting_types import ENV_PREFIX
from config.settings import Settings, load_rejecting_unknown
from demo.processes import ROOT
from worker.ledger.tables import ALL_TABLES
from worker.rules.states import PAYMENT_TRANSITIONS, PaymentState

PATHS_OF_OUTPUT = {"benchmarks/results/latest.json"}
"""Paths that a command creates."""
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("path", generated_files(), ids=lambda path: path.name)
def test_generated_file_is_current(path: Path) -> None:
    """If not, run `make docs`."""
    assert path.read_text() == generated_files()[path]


def test_diagram_has_exactly_the_transitions_of_its_table() -> None:
    """A state without a transition out of it is final."""
    lines = state_diagram(PAYMENT_TRANSITIONS, PaymentState.WAITING).splitlines()[1:]
    transitions = {f"    {state} --> {after}: {event}" for (state, event), after in PAYMENT_TRANSITIONS.items()}
    assert set(lines) == transitions | {
        "    [*] --> waiting",
        "    released --> [*]",
        "    failed --> [*]",
    }


def test_every_setting_has_a_description() -> None:
    """In one sentence at least, next to its definition."""
    assert setting_docstrings().keys() == Settings.model_fields.keys()


def test_every_column_of_the_schema_has_a_meaning() -> None:
    """Finance and auditors read the tables without the code."""
    columns = re.findall(r"^\| `(\w+)` \| [a-z][^|]* \| (?:yes)? \| (.*) \|$", schema_page(), re.MULTILINE)
    assert len(columns) == sum(len(table.columns) for table in ALL_TABLES)
    assert [name for name, meaning in columns if not meaning] == []


def test_each_setting_has_one_topic() -> None:
    """`cli/setting_groups.py` names it once, with the roles to restart."""
    assert sorted(name for restarts in SETTING_GROUPS.values() for name in restarts) == sorted(Settings.model_fields)


def test_example_environment_has_every_setting_with_its_default() -> None:
    """Each of its variables is known, and removing every # changes nothing."""
    lines = [line[1:] for line in (ROOT / ".env.example").read_text().splitlines() if line.startswith(f"#{ENV_PREFIX}")]
    environ = dict(line.split("=", 1) for line in lines)
    assert {name.removeprefix(ENV_PREFIX).lower() for name in environ} == set(Settings.model_fields)
    given = {name: value for name, value in environ.items() if name != "PAYREADY_PRICE_LIST_FILE"}
    assert load_rejecting_unknown(given) == load_rejecting_unknown({})


def test_example_environment_has_the_variables_that_the_procfile_reads() -> None:
    """With their defaults."""
    read = dict(re.findall(r"\$\{((?!PAYREADY_)\w+)(?::-([^}]*))?", (ROOT / "Procfile").read_text()))
    lines = (ROOT / ".env.example").read_text().splitlines()
    documented = dict(line[1:].split("=", 1) for line in lines if re.match(r"#(?!PAYREADY_)[A-Z_]+=", line))
    assert read.items() <= documented.items()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    """A link to a directory works on a forge only, so it is an error too."""
    links = [link.partition("#") for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text())]
    targets = [(page.parent / path if path else page, anchor) for path, _, anchor in links]
    assert [str(path) for path, _ in targets if not path.is_file()] == []
    assert [(path.name, anchor) for path, anchor in targets if anchor and anchor not in _anchors(path)] == []


def _anchors(page: Path) -> set[str]:
    """Return the anchors that a forge gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_backticks_exist(page: Path) -> None:
    """A quoted path whose first part is a directory of the repository leads to a file or a directory."""
    quoted = re.findall(r"`([\w-]+/[^`\s]*)`", page.read_text())
    paths = [path for path in quoted if (ROOT / path.split("/")[0]).is_dir() and path not in PATHS_OF_OUTPUT]
    assert [path for path in paths if not any(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_on_a_page_exist(page: Path) -> None:
    """Each variable on a page is a setting."""
    named = set(re.findall(rf"{ENV_PREFIX}([A-Z_]+)\b", page.read_text()))
    assert {name for name in named if name.lower() not in Settings.model_fields} == set()


def test_log_event_meanings_match_the_code() -> None:
    """Each event in the code has a meaning, and each meaning belongs to an event in the code."""
    assert {event.name for event in log_events()} == set(LOG_EVENT_MEANINGS)


def test_log_events_are_named_noun_dot_verb() -> None:
    """A name is a stable identifier, not a sentence."""
    assert [event for event in log_events() if not re.fullmatch(r"[a-z_]+\.[a-z_]+", event.name)] == []


def test_runbooks_quote_only_log_events_that_exist() -> None:
    """A quoted name that begins with the noun of an event is an event."""
    nouns = {name.partition(".")[0] for name in LOG_EVENT_MEANINGS}
    pages = [*(ROOT / "docs" / "runbooks").glob("*.md"), *(ROOT / "docs" / "howto").glob("*.md")]
    quoted = {
        name
        for page in pages
        for name in re.findall(r"`([a-z_]+\.[a-z_]+)`", page.read_text())
        if name.partition(".")[0] in nouns and not name.endswith((".py", ".json", ".md", ".toml"))
    }
    known = set(LOG_EVENT_MEANINGS) | {"balance.created", "balance.at"}
    assert {name for name in quoted if name not in known} == set()


@pytest.mark.parametrize("call", ['log.log(level, "a.b")', 'log.info("a.b", **fields)'])
def test_event_with_computed_level_or_fields_needs_a_description(call: str) -> None:
    """The generator cannot read them from the call."""
    with pytest.raises(ValueError, match=r"module\.py:1: add a\.b to COMPUTED_EVENTS"):
        list(_events_of("module.py", call))


def test_computed_events_are_logged() -> None:
    assert set(COMPUTED_EVENTS) <= {event.name for event in log_events()}
