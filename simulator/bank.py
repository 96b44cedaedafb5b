"""Bank of the simulator: true balances of accounts, and the debits that it pays or cannot pay. No I/O and no clock.

An account without a true balance has the amounts of its scenario. All times are Unix seconds.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from random import Random
from typing import Any, Literal

BalanceTime = Literal["read", "record"]
"""What `at` of a balance record means: when the bank was read, or when the provider created the record."""

_LATE_RATIO = 0.2
_REPEAT_RATIO = 0.2


class UnknownBankAccount(LookupError):
    """The account has no true balance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BankSettings:
    """Opening balance of an account, and how the provider reports it."""

    balance: Decimal
    balance_time: BalanceTime = "record"
    max_late_s: float = 0.0
    """At random, webhooks of the account are late by up to this, or are repeated, and so come out of order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Debit:
    """The debit of one payment."""

    payment_id: str
    account_id: str
    amount: Decimal
    at: float
    balance_before: Decimal
    paid: bool
    """False if the true balance did not cover the amount. The balance then stays unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BankRead:
    """The true balance at the time when the provider read it from the bank."""

    balance: Decimal
    record_at: float
    """Time that the balance record states as `at`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookTiming:
    """When the event of a balance record is sent, in seconds after the record was created."""

    late_s: float = 0.0
    repeat_after_s: float | None = None
    """When the same event is sent again. None: once only."""


@dataclass(slots=True)
class _BankAccount:
    settings: BankSettings
    times: list[float]
    balances: list[Decimal]
    """The true balance from each of `times` on."""

    def change(self, amount: Decimal, now: float) -> None:
        self.times.append(max(now, self.times[-1]))
        self.balances.append(self.balances[-1] + amount)

    def balance_at(self, at: float) -> Decimal:
        return self.balances[max(0, bisect_right(self.times, at) - 1)]


@dataclass(slots=True)
class Bank:
    """True balances by account id, and the debits by payment id."""

    _accounts: dict[str, _BankAccount] = field(default_factory=dict)
    _debits: dict[str, Debit] = field(default_factory=dict)

    def open_accounts(self, settings: Mapping[str, BankSettings], now: float) -> None:
        """Set the true balances of these accounts. An account that has one loses its history."""
        for account_id, of_account in settings.items():
            self._accounts[account_id] = _BankAccount(of_account, [now], [of_account.balance])

    def debit_once(self, payment_id: str, account_id: str, amount: Decimal, now: float) -> Debit:
        """Debit a payment, unless its true balance would fall below 0. A repetition returns the first result.

        Raises:
            UnknownBankAccount: the account has no true balance.
        """
        if payment_id not in self._debits:
            account = self._account(account_id)
            before = account.balances[-1]
            if before >= amount:
                account.change(-amount, now)
            self._debits[payment_id] = Debit(
                payment_id=payment_id,
                account_id=account_id,
                amount=amount,
                at=now,
                balance_before=before,
                paid=before >= amount,
            )
        return self._debits[payment_id]

    def credit(self, account_id: str, amount: Decimal, now: float) -> Decimal:
        """Add an amount to the true balance, and return the new balance.

        Raises:
            UnknownBankAccount: the account has no true balance.
        """
        account = self._account(account_id)
        account.change(amount, now)
        return account.balances[-1]

    def balance(self, account_id: str) -> Decimal | None:
        """Return the true balance now. None if the account has none."""
        account = self._accounts.get(account_id)
        return account.balances[-1] if account else None

    def read(self, account_id: str, called_at: float, now: float, rng: Random) -> BankRead | None:
        """Return what the provider read at a random time between the call and now. None without a true balance."""
        account = self._accounts.get(account_id)
        if account is None:
            return None
        read_at = rng.uniform(called_at, now)
        record_at = read_at if account.settings.balance_time == "read" else now
        return BankRead(balance=account.balance_at(read_at), record_at=record_at)

    def draw_webhook_timing(self, account_id: str, rng: Random) -> WebhookTiming:
        """Return when the event of a record of the account is sent."""
        account = self._accounts.get(account_id)
        if account is None or not account.settings.max_late_s:
            return WebhookTiming()
        max_late_s = account.settings.max_late_s
        late_s = rng.uniform(0, max_late_s) if rng.random() < _LATE_RATIO else 0.0
        repeat_after_s = rng.uniform(0, max_late_s) if rng.random() < _REPEAT_RATIO else None
        return WebhookTiming(late_s=late_s, repeat_after_s=repeat_after_s)

    def as_json(self) -> dict[str, Any]:
        """Return the true balances and all debits, with amounts as strings."""
        return {
            "balances": {account_id: str(account.balances[-1]) for account_id, account in self._accounts.items()},
            "debits": [debit_as_json(debit) for debit in self._debits.values()],
        }

    def _account(self, account_id: str) -> _BankAccount:
        if account_id not in self._accounts:
            raise UnknownBankAccount(account_id)
        return self._accounts[account_id]


def debit_as_json(debit: Debit) -> dict[str, Any]:
    """Return a debit with its amounts as strings."""
    return asdict(debit) | {"amount": str(debit.amount), "balance_before": str(debit.balance_before)}
