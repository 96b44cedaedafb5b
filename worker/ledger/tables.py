"""The tables. The migrations under `migrations/` create them; `make check` compares the two.

Deadlines are rows, not timers: `due_at` is when a row must be processed, or null, and has a partial index.
"""

from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ColumnElement,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Text,
    literal_column,
)
from sqlalchemy import text as sql
from sqlmodel import Field, SQLModel

from worker.ledger.archive_tables import ARCHIVE_TABLES, table_of
from worker.ledger.audit_tables import AUDIT_TABLES
from worker.ledger.column_types import ExactDecimal, Json, UtcTime
from worker.rules.pricing import EntryState
from worker.rules.states import IN_FLIGHT_STATES, PaymentState, RefreshState


def _quoted_states(*states: str) -> str:
    return ", ".join(f"'{state}'" for state in sorted(states))


def state_in(column: ColumnElement[str], states: Iterable[str]) -> ColumnElement[bool]:
    """Return the condition that the column has one of these states, written as the partial indexes write it.

    The states are literals. With bind parameters PostgreSQL cannot match a partial index.
    """
    literals: list[ColumnElement[str]] = [literal_column(f"'{state}'") for state in sorted(states)]
    return column == literals[0] if len(literals) == 1 else column.in_(literals)


def _partial_index(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    return Index(name, *columns, unique=unique, postgresql_where=sql(where), sqlite_where=sql(where))


class PaymentRow(SQLModel, table=True):
    """A payment-initiation job with its state and outcome."""

    __tablename__ = "payment"
    __table_args__ = (
        # The condition is equal to `state = 'waiting'`, but not written so: otherwise PostgreSQL uses this index of all
        # waiting payments for queries on the waiting payments of one account.
        _partial_index("payment_due_at", "due_at", where="resolved_at IS NULL"),
        _partial_index("payment_waiting", "account_id", "deadline", where=f"state = '{PaymentState.WAITING}'"),
        _partial_index("payment_hold", "account_id", "hold_until", where="hold_until IS NOT NULL"),
        _partial_index(
            "payment_connection",
            "connection_id",
            where=f"state = '{PaymentState.WAITING}' AND connection_id IS NOT NULL",
        ),
        _partial_index(
            "payment_profile", "profile_id", where=f"state = '{PaymentState.WAITING}' AND profile_id IS NOT NULL"
        ),
        _partial_index("payment_sharers", "refresh_id", "reused", where="refresh_id IS NOT NULL"),
        _partial_index("payment_resolved", "resolved_at", where="resolved_at IS NOT NULL"),
        Index("payment_requested", "requested_at"),
        _partial_index("payment_without_hold", "account_id", where="resolved_at IS NOT NULL AND hold_until IS NULL"),
    )

    payment_id: str = Field(primary_key=True, sa_type=Text)
    """Id that the payments service gave the payment."""
    account_id: str = Field(sa_type=Text)
    """Id of the account at the provider."""
    state: str = Field(sa_type=Text)
    """`waiting`, `released` or `failed`."""
    job: dict[str, Any] = Field(sa_type=Json)
    """The job as received, without defaults, and without `payment_id`, `account_id` and `amount`: columns have them."""
    connection_id: str | None = Field(default=None, sa_type=Text)
    """The account's connection at the provider, if the job names it. A later event may change it."""
    connection_as_of: datetime | None = Field(default=None, sa_type=UtcTime)
    """Time of the last event that moved the account to `connection_id`; an older event does not change it."""
    profile_id: str | None = Field(default=None, sa_type=Text)
    """The account's profile at the provider, if the job names it. Balance polls need it."""
    amount: Decimal | None = Field(sa_type=ExactDecimal)
    """Amount of the payment, if the job has one."""
    requested_at: datetime = Field(sa_type=UtcTime)
    """When payready accepted the job."""
    min_balance_at: datetime = Field(sa_type=UtcTime)
    """Earliest time of a balance that may release the payment."""
    deadline: datetime = Field(sa_type=UtcTime)
    """When the payment fails if no balance has resolved it."""
    due_at: datetime = Field(sa_type=UtcTime)
    """When maintenance next checks the waiting payment: 5 s after its request (does a refresh serve it?), before the
    deadline (balance poll), and at the deadline."""
    resolved_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """When the payment was released or failed. Null while it waits."""
    reason: str | None = Field(default=None, sa_type=Text)
    """Failure reason of a failed payment, else null."""
    refresh_id: str | None = Field(default=None, sa_type=Text)
    """The refresh whose balance resolved the payment, or should have. The payment shares its fee, unless `reused`."""
    reused: bool = False
    """Whether the payment was resolved without a share of the fee of its call, for instance by a reused balance."""
    balance_id: str | None = Field(default=None, sa_type=Text)
    """The balance that resolved the payment. Null if it failed without one."""
    funds_calculation: dict[str, Any] | None = Field(default=None, sa_type=Json)
    """Inputs and result of the funds check of a failed payment. Those of a released payment are in its outcome."""
    hold_until: datetime | None = Field(default=None, sa_type=UtcTime)
    """End of the funds hold of a released payment. `HOLD_OPEN` until the outcome is delivered. Null without a hold."""
    outcome: dict[str, Any] | None = Field(default=None, sa_type=Json)
    """The outcome, the same for every task of this payment and every delivery. That of a released payment lacks what
    other columns have and what is usual, such as the verdict `sufficient`; `payready payment show` has all of it."""


class OutcomeDeliveryRow(SQLModel, table=True):
    """A Celery task that gets a payment's outcome, with the continuation that resumes it."""

    __tablename__ = "outcome_delivery"
    __table_args__ = (
        Index("outcome_delivery_payment", "payment_id"),
        _partial_index("outcome_delivery_due_at", "due_at", where="due_at IS NOT NULL"),
        _partial_index("outcome_delivery_undeliverable", "task_id", where="undeliverable IS NOT NULL"),
    )

    task_id: str = Field(primary_key=True, sa_type=Text)
    """Id of the Celery task."""
    payment_id: str = Field(sa_type=Text, sa_column_args=[ForeignKey("payment.payment_id")])
    """The payment whose outcome the task gets."""
    continuation: dict[str, Any] = Field(sa_type=Json)
    """What Celery needs to finish the suspended task: its request, callbacks, chain, chord and group. Its id and usual
    values are left out."""
    due_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """When the sweep delivers the outcome. Null while the payment waits, and after the delivery."""
    delivered_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """When the outcome was delivered last. Null before."""
    failed_tries: int = Field(default=0, sa_column_kwargs={"server_default": sql("0")})
    """Deliveries that failed although broker and result backend responded."""
    undeliverable: str | None = Field(default=None, sa_type=Text)
    """Why the outcome is not delivered any more, after several such failures. Null otherwise."""


class RefreshRow(SQLModel, table=True):
    """One attempt to get a fresh balance of an account. It makes at most two calls that may have been accepted."""

    __tablename__ = "refresh"
    __table_args__ = (
        _partial_index(
            "refresh_in_flight", "account_id", where=f"state IN ({_quoted_states(*IN_FLIGHT_STATES)})", unique=True
        ),
        _partial_index("refresh_requested", "account_id", where=f"state = '{RefreshState.REQUESTED}'"),
        _partial_index("refresh_due_at", "due_at", where="due_at IS NOT NULL"),
        Index("refresh_account", "account_id", "called_at"),
    )

    refresh_id: str = Field(primary_key=True, sa_type=Text)
    """Id of the refresh, made by payready."""
    account_id: str = Field(sa_type=Text)
    """Id of the account at the provider."""
    state: str = Field(sa_type=Text)
    """`requested`, `calling`, `accepted`, `uncertain`, `answered`, `rejected`, `unanswered` or `abandoned`."""
    call_count: int = 0
    """Calls that were or may have been accepted."""
    deferral_count: int = 0
    """Calls that could not be made or were provably not accepted, and were deferred."""
    called_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """Time of the first call that may have been accepted."""
    claimed_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """Time of the last claim. The refresh window starts here."""
    not_before: datetime | None = Field(default=None, sa_type=UtcTime)
    """Earliest time of the call while the refresh is requested, if it was deferred or delayed."""
    due_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """Next check by maintenance."""
    last_error: str | None = Field(default=None, sa_type=Text)
    """Error of the last call that failed."""


class FeeEntryRow(SQLModel, table=True):
    """An entry of the append-only fee ledger: `pending` before a call, then once `posted` or `void`."""

    __tablename__ = "fee_entry"
    __table_args__ = (
        CheckConstraint(f"state IN ({_quoted_states(*EntryState)})", name="fee_entry_state"),
        _partial_index("fee_entry_pending", "call_id", where="state = 'pending'", unique=True),
        _partial_index("fee_entry_final", "call_id", where="state <> 'pending'", unique=True),
        Index("fee_entry_refresh", "refresh_id"),
        Index("fee_entry_recorded_at", "recorded_at"),
        Index("fee_entry_called_at", "called_at"),
        # Posted entries confirm their pending ones, and are not counted: `cap_usage.COUNT_WEIGHT`.
        _partial_index("fee_entry_account", "account_id", "called_at", where="state <> 'posted'"),
    )

    entry_id: int | None = Field(default=None, primary_key=True, sa_type=BigInteger().with_variant(Integer, "sqlite"))
    """Number of the entry, in the order of writing."""
    call_id: str = Field(sa_type=Text)
    """Id of the call, made by payready. All entries of a call have it."""
    refresh_id: str = Field(sa_type=Text, sa_column_args=[ForeignKey("refresh.refresh_id")])
    """The refresh that the call belongs to."""
    account_id: str = Field(sa_type=Text)
    """Id of the account at the provider."""
    state: str = Field(sa_type=Text)
    """`pending`, `posted` or `void`."""
    price: Decimal = Field(sa_type=ExactDecimal)
    """Price of the call. Only the state says whether it is billed."""
    currency: str = Field(sa_type=Text)
    """ISO 4217 code of the price."""
    price_list: str = Field(sa_type=Text)
    """Version of the price list that has the price."""
    evidence: dict[str, Any] = Field(sa_type=Json)
    """What proved a final entry: an HTTP status, that nothing was sent, a balance or an invoice line. Of a pending
    entry, the mode of the API key, which decided its price."""
    called_at: datetime = Field(sa_type=UtcTime)
    """Time of the call, the same in all its entries: sums over a period need no join."""
    recorded_at: datetime = Field(sa_type=UtcTime)
    """When the entry was written."""


class InvoiceRow(SQLModel, table=True):
    """An applied invoice of which the charged calls near its boundaries are known. Neighbouring months need them."""

    __tablename__ = "invoice"

    digest: str = Field(primary_key=True, sa_type=Text)
    """SHA-256 of the file."""
    currency: str = Field(primary_key=True, sa_type=Text)
    """ISO 4217 code of the lines that were applied."""
    since: datetime = Field(primary_key=True, sa_type=UtcTime)
    """Start of the invoice's period."""
    until: datetime = Field(sa_type=UtcTime)
    """End of the period, exclusive."""
    tolerance_s: int = Field(primary_key=True)
    """Tolerance between the invoice's times and the ledger's, in seconds."""
    name: str = Field(sa_type=Text)
    """Name of the file."""
    edge_calls: list[str] = Field(sa_type=Json)
    """Ids of the calls that it charged so near to a boundary of its period that another invoice could charge them."""
    applied_at: datetime = Field(sa_type=UtcTime)
    """When the invoice was applied first."""


class BalanceRow(SQLModel, table=True):
    """A balance that may resolve payments: source REFRESH, or a polled one if the settings allow its source."""

    __tablename__ = "balance"
    __table_args__ = (
        Index("balance_received", "account_id", "received_at"),
        _partial_index("balance_due_at", "due_at", where="due_at IS NOT NULL"),
        _partial_index("balance_rejected", "received_at", where="rejected IS NOT NULL"),
    )

    balance_id: str = Field(primary_key=True, sa_type=Text)
    """Id of the balance at the provider."""
    event_id: str = Field(sa_type=Text)
    """Id of the event that the balance was received with; `poll:` and the balance's id if it was polled."""
    account_id: str = Field(sa_type=Text)
    """Id of the account at the provider."""
    at: datetime = Field(sa_type=UtcTime)
    """Time of the balance by the provider's clock."""
    source: str = Field(sa_type=Text)
    """Why the provider wrote the balance: `REFRESH`, `SYNC` or `INITIAL`."""
    available: Decimal | None = Field(sa_type=ExactDecimal)
    """Available amount in the account's currency. Null if the bank reports none."""
    current: Decimal | None = Field(sa_type=ExactDecimal)
    """Current amount in the account's currency. Null if the bank reports none."""
    limit: Decimal | None = Field(sa_type=ExactDecimal)
    """Overdraft limit in the account's currency. Null if the bank reports none."""
    received_at: datetime = Field(sa_type=UtcTime)
    """When payready received the balance."""
    due_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """When the sweep applies the balance. Null after it was applied."""
    refresh_id: str | None = Field(default=None, sa_type=Text)
    """The refresh that the balance is attributed to, if any."""
    as_of: datetime | None = Field(default=None, sa_type=UtcTime)
    """Time as of which the balance is believed: never later than `received_at`. Null in rows of version 0.2.0."""
    rejected: str | None = Field(default=None, sa_type=Text)
    """Why the balance resolved no payment of the call that it came for: `too_old` or `after_deadline`."""


class AccountRow(SQLModel, table=True):
    """The account facts that the last read of an account returned, free of charge."""

    __tablename__ = "account"

    account_id: str = Field(primary_key=True, sa_type=Text)
    """Id of the account at the provider."""
    kind: str | None = Field(default=None, sa_type=Text)
    """The provider's kind of the account, such as `DEPOSITORY`. Null if unknown, or if the read failed."""
    currency: str | None = Field(default=None, sa_type=Text)
    """ISO 4217 code of the account's currency. Null if unknown, or if the read failed."""
    read_at: datetime = Field(sa_type=UtcTime)
    """When the account was read. Known facts are read again after a day, unknown ones after a minute."""


class QuarantineRow(SQLModel, table=True):
    """An event with a valid signature that payready uses, but cannot parse."""

    __tablename__ = "quarantine"

    quarantine_id: str = Field(primary_key=True, sa_type=Text)
    """A digest of the event, so that a repeated delivery adds no row."""
    event: bytes = Field(sa_type=LargeBinary)
    """The bytes as received. They need not be text."""
    reason: str = Field(sa_type=Text)
    """Why the event cannot be parsed."""
    received_at: datetime = Field(sa_type=UtcTime)
    """When the event was received first."""


class DeadLetterRow(SQLModel, table=True):
    """A message of one of payready's queues that no worker can process."""

    __tablename__ = "dead_letter"
    __table_args__ = (Index("dead_letter_stored_at", "stored_at"),)

    dead_letter_id: str = Field(primary_key=True, sa_type=Text)
    """A digest of queue and message, so that storing the message again adds no row."""
    queue: str = Field(sa_type=Text)
    """The queue that the message was fetched from, without the name of the instance."""
    reason: str = Field(sa_type=Text)
    """`unreadable`, `unknown_task` or `worker_died`."""
    detail: str = Field(sa_type=Text)
    """The field and the rule that it breaks."""
    task_id: str | None = Field(default=None, sa_type=Text)
    """Id of the message's task, if it can be read."""
    task_name: str | None = Field(default=None, sa_type=Text)
    """Name of the message's task, if it can be read."""
    size_bytes: int
    """Size of the whole message."""
    occurrences: int
    """How often the message was stored. A requeued message that was stored again meanwhile is not deleted."""
    stored_at: datetime = Field(sa_type=UtcTime)
    """When the message was stored last."""
    message: bytes = Field(sa_type=LargeBinary)
    """The first 256 KiB of the message as the broker had it. The bytes need not be text."""


# Queries use the tables: to a type checker their columns are expressions, but the attributes of a model are values.
PAYMENT = table_of(PaymentRow)
OUTCOME_DELIVERY = table_of(OutcomeDeliveryRow)
REFRESH = table_of(RefreshRow)
FEE_ENTRY = table_of(FeeEntryRow)
INVOICE = table_of(InvoiceRow)
BALANCE = table_of(BalanceRow)
ACCOUNT = table_of(AccountRow)
QUARANTINE = table_of(QuarantineRow)
DEAD_LETTER = table_of(DeadLetterRow)
IS_WAITING = state_in(PAYMENT.c.state, {PaymentState.WAITING})
_FLOW_TABLES = (PAYMENT, OUTCOME_DELIVERY, REFRESH, FEE_ENTRY, INVOICE, BALANCE, ACCOUNT, QUARANTINE, DEAD_LETTER)
ALL_TABLES = (*_FLOW_TABLES, *ARCHIVE_TABLES, *AUDIT_TABLES)
