"""The tables. The migrations under `migrations/` make them; `make check` proves that the two agree.

Rows that need attention at some time carry it as `due_at`, with an index on just those rows: deadlines are rows,
not timers. `due_at` is null when nothing more is due.
"""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Numeric,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy import text as sql
from sqlalchemy.types import TypeDecorator, TypeEngine
from sqlmodel import Field, SQLModel

from worker.rules.pricing import EntryState
from worker.rules.states import IN_FLIGHT_STATES, PaymentState, RefreshState


class UtcTime(TypeDecorator[datetime]):
    """An aware UTC time on every database; SQLite has no time zones, so it keeps UTC without one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive times; to UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone must not reach the ledger")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To aware UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class ExactDecimal(TypeDecorator[Decimal]):
    """A decimal that no database rounds: NUMERIC on PostgreSQL, text on SQLite (whose numbers are floats)."""

    impl = Numeric
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Text on SQLite."""
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else Numeric())

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> Any:
        """Plain text on SQLite."""
        return value if value is None or dialect.name != "sqlite" else format(value, "f")

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        """Back to a decimal."""
        return None if value is None else Decimal(value)


Json = JSON(none_as_null=True)


def _quoted_states(*states: str) -> str:
    return ", ".join(f"'{state}'" for state in sorted(states))


def _partial_index(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    return Index(name, *columns, unique=unique, postgresql_where=sql(where), sqlite_where=sql(where))


class Payment(SQLModel, table=True):
    """One payment-initiation job and what became of it."""

    __tablename__ = "payment"
    __table_args__ = (
        # All that wait are not settled; said so, no query for those of one account takes it for an index of few.
        _partial_index("payment_due_at", "due_at", where="resolved_at IS NULL"),
        _partial_index("payment_waiting", "account_id", "deadline", where=f"state = '{PaymentState.WAITING}'"),
        _partial_index("payment_released", "account_id", "resolved_at", where=f"state = '{PaymentState.RELEASED}'"),
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
    )

    payment_id: str = Field(primary_key=True, sa_type=Text)
    account_id: str = Field(sa_type=Text)
    state: str = Field(sa_type=Text)
    job: dict[str, Any] = Field(sa_type=Json)
    """The job as it came, without defaults."""
    connection_id: str | None = Field(default=None, sa_type=Text)
    connection_as_of: datetime | None = Field(default=None, sa_type=UtcTime)
    """As of when `connection_id` is known, if the provider told it since: only what is newer changes it."""
    profile_id: str | None = Field(default=None, sa_type=Text)
    amount: Decimal | None = Field(sa_type=ExactDecimal)
    requested_at: datetime = Field(sa_type=UtcTime)
    min_balance_at: datetime = Field(sa_type=UtcTime)
    """The oldest time that a balance may have and still release it."""
    deadline: datetime = Field(sa_type=UtcTime)
    due_at: datetime = Field(sa_type=UtcTime)
    """When upkeep looks at it next while it waits: soon, to see that a call is under way; then at the deadline."""
    resolved_at: datetime | None = Field(default=None, sa_type=UtcTime)
    reason: str | None = Field(default=None, sa_type=Text)
    refresh_id: str | None = Field(default=None, sa_type=Text)
    """Whose call served it, or should have: it shares that call's fee, unless `reused`."""
    reused: bool = False
    """Released by a balance that was there before it: no share of the fee."""
    balance_id: str | None = Field(default=None, sa_type=Text)
    funds_calculation: dict[str, Any] | None = Field(default=None, sa_type=Json)
    """How the funds verdict was reached."""
    outcome: dict[str, Any] | None = Field(default=None, sa_type=Json)
    """What every task that waits for this payment is told, the same each time."""


class OutcomeDeliveryRow(SQLModel, table=True):
    """A Celery task that waits for a payment's outcome, with the continuation it goes on with."""

    __tablename__ = "outcome_delivery"
    __table_args__ = (
        Index("outcome_delivery_payment", "payment_id"),
        _partial_index("outcome_delivery_due_at", "due_at", where="due_at IS NOT NULL"),
    )

    task_id: str = Field(primary_key=True, sa_type=Text)
    payment_id: str = Field(sa_type=Text, sa_column_args=[ForeignKey("payment.payment_id")])
    continuation: dict[str, Any] = Field(sa_type=Json)
    due_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """Null while the payment waits, and again when delivered; between, when the sweep delivers it."""
    delivered_at: datetime | None = Field(default=None, sa_type=UtcTime)


class Refresh(SQLModel, table=True):
    """One attempt to have an account's balance made fresh."""

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
    account_id: str = Field(sa_type=Text)
    state: str = Field(sa_type=Text)
    call_count: int = 0
    """Calls that were accepted, or may have been."""
    deferral_count: int = 0
    """Calls that provably were not, and were put off."""
    called_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """When the first call that may have been accepted went out."""
    claimed_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """When the last call went out; its window counts from here."""
    not_before: datetime | None = Field(default=None, sa_type=UtcTime)
    """While it is requested: when it may be called, if it was put off."""
    due_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """When upkeep looks at it next."""
    last_error: str | None = Field(default=None, sa_type=Text)
    """What the last call that failed met with."""


class FeeEntry(SQLModel, table=True):
    """A line of the fee ledger: `pending` before a call, then `posted` or `void`, once. Never changed or removed."""

    __tablename__ = "fee_entry"
    __table_args__ = (
        CheckConstraint(f"state IN ({_quoted_states(*EntryState)})", name="fee_entry_state"),
        UniqueConstraint("call_id", "state", name="fee_entry_once"),
        _partial_index("fee_entry_final", "call_id", where="state <> 'pending'", unique=True),
        Index("fee_entry_refresh", "refresh_id"),
        Index("fee_entry_recorded_at", "recorded_at"),
        Index("fee_entry_called_at", "called_at"),
        Index("fee_entry_account", "account_id", "called_at"),
    )

    entry_id: int | None = Field(default=None, primary_key=True, sa_type=BigInteger().with_variant(Integer, "sqlite"))
    call_id: str = Field(sa_type=Text)
    refresh_id: str = Field(sa_type=Text, sa_column_args=[ForeignKey("refresh.refresh_id")])
    account_id: str = Field(sa_type=Text)
    state: str = Field(sa_type=Text)
    price: Decimal = Field(sa_type=ExactDecimal)
    currency: str = Field(sa_type=Text)
    price_list: str = Field(sa_type=Text)
    """The version of the price list the price was taken from."""
    evidence: dict[str, Any] = Field(sa_type=Json)
    called_at: datetime = Field(sa_type=UtcTime)
    """When its call was made: the same on all entries of a call, so that sums over a period need no join."""
    recorded_at: datetime = Field(sa_type=UtcTime)


class InvoiceRow(SQLModel, table=True):
    """An invoice that calls were settled by: its neighbours ask for it."""

    __tablename__ = "invoice"

    digest: str = Field(primary_key=True, sa_type=Text)
    """SHA-256 of the file."""
    currency: str = Field(primary_key=True, sa_type=Text)
    since: datetime = Field(primary_key=True, sa_type=UtcTime)
    until: datetime = Field(sa_type=UtcTime)
    tolerance_s: int = Field(primary_key=True)
    """How far its times and ours were taken to be apart."""
    name: str = Field(sa_type=Text)
    edge_calls: list[str] = Field(sa_type=Json)
    """The calls that it charges so near to the ends of its period that another one could, too."""
    applied_at: datetime = Field(sa_type=UtcTime)


class BalanceRow(SQLModel, table=True):
    """A balance that may settle payments: with source REFRESH, or one that was read and that the settings let in."""

    __tablename__ = "balance"
    __table_args__ = (
        Index("balance_account", "account_id", "at"),
        _partial_index("balance_due_at", "due_at", where="due_at IS NOT NULL"),
    )

    balance_id: str = Field(primary_key=True, sa_type=Text)
    event_id: str = Field(sa_type=Text)
    account_id: str = Field(sa_type=Text)
    at: datetime = Field(sa_type=UtcTime)
    source: str = Field(sa_type=Text)
    available: Decimal | None = Field(sa_type=ExactDecimal)
    current: Decimal | None = Field(sa_type=ExactDecimal)
    limit: Decimal | None = Field(sa_type=ExactDecimal)
    received_at: datetime = Field(sa_type=UtcTime)
    due_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """Null once it was applied to those who wait; till then, when the sweep applies it."""
    refresh_id: str | None = Field(default=None, sa_type=Text)
    """The refresh it answered, if it can be told."""


class Quarantine(SQLModel, table=True):
    """A rightly signed event that payready should understand but does not."""

    __tablename__ = "quarantine"

    quarantine_id: str = Field(primary_key=True, sa_type=Text)
    """A digest of the event, so that a repeated delivery adds nothing."""
    event: bytes = Field(sa_type=LargeBinary)
    """As it came, byte for byte: it need not be text."""
    reason: str = Field(sa_type=Text)
    received_at: datetime = Field(sa_type=UtcTime)


def _table_of(model: type[SQLModel]) -> Table:
    return SQLModel.metadata.tables[str(model.__tablename__)]


# Queries are written on the tables: their columns are expressions to a type checker, a model's attributes are values.
PAYMENT = _table_of(Payment)
OUTCOME_DELIVERY = _table_of(OutcomeDeliveryRow)
REFRESH = _table_of(Refresh)
FEE_ENTRY = _table_of(FeeEntry)
INVOICE = _table_of(InvoiceRow)
BALANCE = _table_of(BalanceRow)
QUARANTINE = _table_of(Quarantine)
ALL_TABLES = (PAYMENT, OUTCOME_DELIVERY, REFRESH, FEE_ENTRY, INVOICE, BALANCE, QUARANTINE)
