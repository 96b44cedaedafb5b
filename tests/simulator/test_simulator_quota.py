"""The quota of calls per second, and its response headers."""

from simulator.fake_provider import PerSecondQuota


def test_calls_above_the_limit_get_no_slot() -> None:
    quota = PerSecondQuota()
    assert [quota.take_slot(2, now=10.5) for _ in range(3)] == [True, True, False]
    assert quota.headers(2, now=10.9)["Ratelimit-Remaining"] == "0"


def test_headers_show_the_usage_of_the_present_second() -> None:
    """The response to an unauthenticated call takes no slot, so no call may have begun a new second."""
    quota = PerSecondQuota()
    quota.take_slot(2, now=10.5)
    assert quota.headers(2, now=11.0) == {
        "Ratelimit-Limit": "2",
        "Ratelimit-Remaining": "2",
        "Ratelimit-Reset": "12",
    }
