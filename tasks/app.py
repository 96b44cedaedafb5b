"""The Celery application: `celery -A tasks.app worker`."""

import sys
from typing import Any

from celery import Celery
from celery.signals import setup_logging
from kombu.transport import TRANSPORT_ALIASES

from config.celery import celery_settings
from config.logs import configure_logging
from config.settings import ConfigurationError, settings


def _make_app() -> Celery:
    try:
        configuration = celery_settings(settings())
    except ConfigurationError as error:
        sys.exit(f"payready cannot start: {error}")
    if settings().broker_transport == "atomic":  # this is where kombu looks up the scheme of a broker's address
        TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), "tasks.broker:RedisTransport"))
    app = Celery("payready", include=["tasks.payments", "tasks.balances", "tasks.upkeep", "tasks.revocation"])
    app.conf.update(configuration)
    return app


@setup_logging.connect
def _our_logging(**_: Any) -> None:
    configure_logging(settings())


app = _make_app()
