"""The error of a missing broker. Commands that need no broker report it without an import of Celery."""


class CeleryUnavailable(Exception):
    """The broker or the result backend did not respond; the message says what to check."""

    def __init__(self, message: str, problem: str | None = None) -> None:
        super().__init__(message)
        self.problem = problem or message
        """What its client reports, without what to check."""
