from random import Random

import pytest

from simulator.scenarios import ACCOUNT_ID, SCENARIOS, Defaults, EventDelay, draw_scenario, scenario_of, scenario_table


@pytest.mark.parametrize("name", SCENARIOS)
def test_letters_after_acct_select_the_scenario(name: str) -> None:
    """An id with a scenario's name and a digit or capital after it selects that scenario, and is a valid id."""
    for account_id in (f"acct_{name}0001", f"acct_{name}Xy1", f"acct_{name}"):
        assert ACCOUNT_ID.fullmatch(account_id)
        assert scenario_of(account_id).name == name


@pytest.mark.parametrize(
    "account_id", ["acct_12Hz9Dz7vEAuljYvhmPcvM9", "acct_slowly1", "acct_Slow1", "conn_slow1", "x"]
)
def test_any_other_account_is_prompt(account_id: str) -> None:
    """Ids without a scenario's name select `prompt`."""
    assert scenario_of(account_id).name == "prompt"


def test_table_lists_each_scenario_once() -> None:
    """The table has one line per scenario, which starts with its name."""
    assert [line.split()[0] for line in scenario_table().splitlines()] == list(SCENARIOS)


def test_mix_draws_the_same_with_the_same_seed() -> None:
    """The order of the calls and the seed determine the effective scenarios."""
    runs = [
        [draw_scenario(SCENARIOS["mix"], rng)[0].name for _ in range(200)] for rng in (Random(1), Random(1), Random(2))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_mix_draws_only_scenarios_that_succeed() -> None:
    """No drawn scenario fails permanently, and all scenarios of the mix are drawn."""
    rng = Random(3)
    acted = {draw_scenario(SCENARIOS["mix"], rng)[0].name for _ in range(500)}
    assert acted == {"prompt", "twice", "early", "lost", "throttled"}


def test_other_scenarios_are_their_own_effective_scenario() -> None:
    """Only `mix` draws an effective scenario."""
    assert draw_scenario(SCENARIOS["late"], Random(4)) == (SCENARIOS["late"], EventDelay.LATE)


def test_each_event_delay_has_its_seconds() -> None:
    """Prompt varies around its mean, mixed between 0 and 2 s; slow and late are exact; none is 0."""
    defaults, rng = Defaults(), Random(5)
    assert all(0.15 <= defaults.delay_s(EventDelay.PROMPT, rng) <= 0.45 for _ in range(100))
    assert all(0 <= defaults.delay_s(EventDelay.MIXED, rng) <= 2 for _ in range(100))
    assert [defaults.delay_s(pace, rng) for pace in (EventDelay.SLOW, EventDelay.LATE, EventDelay.NONE)] == [
        3.0,
        6.0,
        0.0,
    ]
