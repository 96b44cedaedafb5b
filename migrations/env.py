"""Alembic's way into the ledger: `alembic upgrade head` on the database of the settings."""

from alembic import context

from config.settings import settings
from worker.ledger.database import open_engine
from worker.ledger.tables import SQLModel

engine = open_engine(settings().database_url)
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=SQLModel.metadata, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
