"""Where an archived payment is, for the error of a command that does not find it."""

from cli.command_line import ledger_engine
from config.settings import ConfigurationError
from worker.ledger import archived_months
from worker.ledger.engine import DATABASE_UNAVAILABLE, read_snapshot
from worker.rules.times import utc_time_text


def archived_text(payment_id: str) -> str | None:
    """Return when a payment was archived, and where its rows are. None if it was not, or if there is no ledger here."""
    try:
        with ledger_engine() as engine, read_snapshot(engine) as tx:
            archived = archived_months.month_with_payment(tx, payment_id)
    except (ConfigurationError, *DATABASE_UNAVAILABLE):
        return None
    if archived is None:
        return None
    return f"{payment_id} was archived on {utc_time_text(archived.copied_at)}, with {archived.folder}"
