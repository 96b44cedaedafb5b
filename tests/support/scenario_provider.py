"""A scenario of jobs and provider responses, and the simulated provider that plays it."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from tests.support.fault_injection import Operations
from tests.support.in_process import Clock
from worker.errors import CallFailed, CallResultUnknown
from worker.quiltt.messages import Balance, PolledAccount


@dataclass(frozen=True)
class Scenario:
    """Jobs by the second at which they are sent (None: the cancellation of `p1`), and the results of the calls."""

    jobs: tuple[tuple[int, dict[str, Any] | None], ...]
    responses: tuple[str | CallFailed, ...] = ()
    """`balance` (default): 202, and a balance 2 s later. `silence`: 202 without a balance. `unsent`: 202, and a balance
    that only a poll shows. `lost`: accepted without a response. An exception: the rejected call raises it."""
    times_s: tuple[int, ...] = (0, 1, 3, 6)
    """Times at which deliveries and maintenance run."""
    available: str = "100.00"


class ScenarioProvider:
    """Test double of `QuilttClient` that responds as the scenario says. Each request can fail."""

    def __init__(self, scenario: Scenario, operations: Operations, clock: Clock) -> None:
        self._scenario, self._operations, self._clock = scenario, operations, clock
        self.attempts: list[datetime] = []
        """Times of all calls."""
        self.accepted: list[datetime] = []
        """Times of the accepted calls, which the provider bills."""
        self.shown: Balance | None = None
        """Balance that a poll returns."""
        self.webhooks: list[tuple[datetime, Balance]] = []
        """Balances to deliver, and the time from which each is due."""

    def introspect_api_key(self) -> str:
        """Return the mode of the API key."""
        return "TEST"

    def request_balance_refresh(self, account_id: str) -> None:
        """Process a refresh call."""
        self._operations.before_operation("send", "the call")
        response = (
            self._scenario.responses[len(self.attempts)]
            if len(self.attempts) < len(self._scenario.responses)
            else "balance"
        )
        self.attempts.append(self._clock.now)
        if isinstance(response, CallFailed):
            self._operations.before_operation("response", "to the call")
            raise response
        self.accepted.append(self._clock.now)
        at = self._clock.now + timedelta(seconds=2)
        if response == "unsent":
            self.shown = self._balance(account_id, at)
        elif response != "silence":
            self.webhooks.append((at, self._balance(account_id, at)))
        self._operations.before_operation("response", "to the call")
        if response == "lost":
            raise CallResultUnknown("read timeout")

    def poll_account(self, account_id: str, profile_id: str) -> PolledAccount | None:  # noqa: ARG002
        """Process a balance poll."""
        self._operations.before_operation("send", "the poll")
        balance = None if self.shown is None else self.shown.model_dump(by_alias=True, mode="json")
        self._operations.before_operation("response", "to the poll")
        return PolledAccount.model_validate({"kind": "DEPOSITORY", "currencyCode": "USD", "balance": balance})

    def _balance(self, account_id: str, at: datetime) -> Balance:
        amounts = {"available": Decimal(self._scenario.available), "current": None, "limit": None}
        record = {"id": f"bal_{len(self.attempts)}", "accountId": account_id, "at": at.isoformat(), "source": "REFRESH"}
        return Balance.model_validate({**record, **amounts})
