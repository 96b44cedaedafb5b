"""Alembic environment: migrates the database of the settings."""

import sys
from contextlib import ExitStack

from alembic import context

from config.log_config import configure_logging, log_start
from config.role_settings import require_settings_of_role
from config.settings import ConfigurationError, settings
from worker.errors import error_summary
from worker.ledger.engine import DATABASE_UNAVAILABLE, UnconfiguredPooler, connect_for_migrations, open_engine
from worker.ledger.tables import PAYMENT

try:
    require_settings_of_role(settings(), "release")
    engine = open_engine(
        settings().database_url,
        connections=1,
        pooler=settings().database_pooler,
        may_create_file=True,
        for_migrations=True,
    )
except ConfigurationError as error:
    sys.exit(f"payready cannot start: {error}")
if context.config.cmd_opts is not None:  # on the command line, not within another process
    configure_logging(settings())
    log_start(settings(), "release")
with ExitStack() as stack:
    stack.callback(engine.dispose)
    try:
        connection = stack.enter_context(connect_for_migrations(engine))
    except UnconfiguredPooler as error:
        sys.exit(f"payready cannot start: {error}")
    except DATABASE_UNAVAILABLE as error:
        sys.exit(
            f"payready cannot start: the database did not respond: {error_summary(error)}; check PAYREADY_DATABASE_URL"
        )
    context.configure(connection=connection, target_metadata=PAYMENT.metadata, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
