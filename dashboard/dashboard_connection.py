"""uvicorn's connection with the limits of `web`, and requests that are large enough for an invoice."""

from config.log_config import get_logger
from dashboard.page_requests import MAX_UPLOAD_BYTES
from webhook.limited_connection import LimitedConnection
from webhook.log_sampling import LogSampler

log = get_logger(__name__)
_log_sampler = LogSampler()


class DashboardConnection(LimitedConnection):
    """One connection. A client that does not read, or that sends its header section too slowly, is disconnected."""

    # Of a request that is too large for its page the rest is dropped, so that its sender reads the response.
    max_request_bytes = 8 * MAX_UPLOAD_BYTES

    def count_and_log_closed(self, reason: str) -> None:
        """Log that the connection is closed because it exceeds a limit, at most once a minute."""
        suppressed = _log_sampler.take_suppressed_count(reason)
        if suppressed is not None:
            log.warning("dashboard.connection_closed", reason=reason, suppressed=suppressed)
