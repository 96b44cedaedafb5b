"""What the role does before it listens, so that the first reader of a page does not wait for it.

The first request would otherwise compile templates and statements, connect to the database, and read an hour of
outcomes and a week of calls. A new connection of PostgreSQL also reads its catalogs once.
"""

from starlette.applications import Starlette

from config.log_config import get_logger
from dashboard.now_feed import NowFeed
from dashboard.page_rendering import compile_templates
from dashboard.provider_reading import ProviderReader
from worker.errors import error_summary
from worker.ledger.engine import DATABASE_UNAVAILABLE

log = get_logger(__name__)


def prepare_pages(app: Starlette) -> None:
    """Compile the templates, and read the slow figures of pages. Without the database, the first readers wait."""
    compile_templates()
    feed: NowFeed = app.state.now_feed
    provider: ProviderReader = app.state.provider_reader
    try:
        feed.reader.prepare()
        provider.prepare()
    except DATABASE_UNAVAILABLE as error:
        log.warning("dashboard.not_prepared", error=error_summary(error))
