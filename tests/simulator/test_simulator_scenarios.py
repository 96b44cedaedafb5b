from __future__ import annotations

from random import Random

import pytest

from simulator.scenarios import ACCOUNT_ID, SCENARIOS, Defaults, EventDelay, draw_scenario, scenario_of, scenario_table


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_letters_after_acct_name_the_scenario(name: str) -> None:
    """An id with a scenario's name and a number or a capital after it asks for that scenario, and is a valid id."""
    for account_id in (f"acct_{name}0001", f"acct_{name}Xy1", f"acct_{name}"):
        assert ACCOUNT_ID.fullmatch(account_id)
        assert scenario_of(account_id).name == name


@pytest.mark.parametrize(
    "account_id", ["acct_12Hz9Dz7vEAuljYvhmPcvM9", "acct_slowly1", "acct_Slow1", "conn_slow1", "x"]
)
def test_any_other_account_is_prompt(account_id: str) -> None:
    """Ids without a scenario's name behave well."""
    assert scenario_of(account_id).name == "prompt"


def test_the_table_lists_each_scenario_once() -> None:
    """The printed table has one line a scenario, beginning with its name."""
    assert [line.split()[0] for line in scenario_table().splitlines()] == list(SCENARIOS)


def test_mix_draws_the_same_with_the_same_seed() -> None:
    """The order of the calls and the seed decide what each call acts as."""
    runs = [
        [draw_scenario(SCENARIOS["mix"], rng)[0].name for _ in range(200)] for rng in (Random(1), Random(1), Random(2))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_mix_draws_only_what_succeeds_in_the_end() -> None:
    """No call of the mix is refused for good, and all its kinds turn up."""
    rng = Random(3)
    acted = {draw_scenario(SCENARIOS["mix"], rng)[0].name for _ in range(500)}
    assert acted == {"prompt", "twice", "early", "lost", "throttled"}


def test_other_scenarios_act_as_themselves() -> None:
    """Nothing is drawn for a scenario that is not mixed."""
    assert draw_scenario(SCENARIOS["late"], Random(4)) == (SCENARIOS["late"], EventDelay.LATE)


def test_each_pace_has_its_delay() -> None:
    """Prompt varies around its middle, mixed between 0 and 2 s, slow and late are exact, none is none."""
    defaults, rng = Defaults(), Random(5)
    assert all(0.15 <= defaults.delay_s(EventDelay.PROMPT, rng) <= 0.45 for _ in range(100))
    assert all(0 <= defaults.delay_s(EventDelay.MIXED, rng) <= 2 for _ in range(100))
    assert [defaults.delay_s(pace, rng) for pace in (EventDelay.SLOW, EventDelay.LATE, EventDelay.NONE)] == [
        3.0,
        6.0,
        0.0,
    ]
