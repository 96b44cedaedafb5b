"""The tables of the archive: which months are archived, their statements, and the payments that were removed."""

from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import Table, Text
from sqlmodel import Field, SQLModel

from worker.ledger.column_types import ExactDecimal, Json, UtcTime


class ArchivedMonthRow(SQLModel, table=True):
    """A month whose rows are in files and whose statement is final."""

    __tablename__ = "archived_month"

    month: str = Field(primary_key=True, sa_type=Text)
    """Month as YYYY-MM, in UTC."""
    since: datetime = Field(sa_type=UtcTime)
    """First moment of the month."""
    until: datetime = Field(sa_type=UtcTime)
    """First moment of the next month."""
    copied_at: datetime = Field(sa_type=UtcTime)
    """Time of the snapshot that the files and the statement were made from."""
    folder: str = Field(sa_type=Text)
    """Folder with the files, on the host of the archive command."""
    manifest: dict[str, Any] = Field(sa_type=Json)
    """The files with their numbers of rows and checksums, and the sums of the fees."""
    removed_at: datetime | None = Field(default=None, sa_type=UtcTime)
    """When the rows were removed. Null while the removal is not complete."""


class ArchivedStatementLineRow(SQLModel, table=True):
    """A line of the statement of an archived month. No call of such a month is pending."""

    __tablename__ = "archived_statement_line"

    month: str = Field(primary_key=True, sa_type=Text)
    """The archived month, as YYYY-MM."""
    grouped_by: str = Field(primary_key=True, sa_type=Text)
    """What the line groups: `price`, `account` or `day`."""
    line: int = Field(primary_key=True)
    """Place of the line in its statement, from 1."""
    key: str = Field(sa_type=Text)
    """The version of the price list, the account id, or the day as YYYY-MM-DD."""
    price: Decimal | None = Field(sa_type=ExactDecimal)
    """Price of a call in a line by price, else null."""
    currency: str = Field(sa_type=Text)
    """ISO 4217 code of the amounts."""
    calls: int
    """Number of calls."""
    posted: int
    """Number of posted calls."""
    void: int
    """Number of void calls."""
    posted_amount: Decimal = Field(sa_type=ExactDecimal)
    """Sum of the fees of posted calls."""
    shared: int | None
    """Payments that shared a call with an earlier payment. Null in a line by price, as the other savings."""
    by_sharing: Decimal | None = Field(sa_type=ExactDecimal)
    """Fees saved by sharing."""
    reused: int | None
    """Payments that a reused balance resolved."""
    by_reuse: Decimal | None = Field(sa_type=ExactDecimal)
    """Fees saved by reuse."""


class ArchivedPaymentRow(SQLModel, table=True):
    """A payment that was removed. A job that repeats its id is refused."""

    __tablename__ = "archived_payment"

    payment_id: str = Field(primary_key=True, sa_type=Text)
    """Id that the payments service gave the payment."""
    month: str = Field(sa_type=Text)
    """The archived month whose files have the payment, as YYYY-MM."""


class ArchiveRemovalRow(SQLModel, table=True):
    """Permission to delete fee entries of archived months. A row exists only within the transaction that deletes."""

    __tablename__ = "archive_removal"

    month: str = Field(primary_key=True, sa_type=Text)
    """The archived month whose rows the transaction removes."""


def table_of(model: type[SQLModel]) -> Table:
    """Return the table of a model: to a type checker its columns are expressions, a model's attributes are values."""
    return SQLModel.metadata.tables[str(model.__tablename__)]


ARCHIVED_MONTH = table_of(ArchivedMonthRow)
ARCHIVED_STATEMENT_LINE = table_of(ArchivedStatementLineRow)
ARCHIVED_PAYMENT = table_of(ArchivedPaymentRow)
ARCHIVE_REMOVAL = table_of(ArchiveRemovalRow)
ARCHIVE_TABLES = (ARCHIVED_MONTH, ARCHIVED_STATEMENT_LINE, ARCHIVED_PAYMENT, ARCHIVE_REMOVAL)
