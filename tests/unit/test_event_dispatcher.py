"""The dispatcher of events: which connections it uses without confirmation."""

from celery import Celery


def test_only_a_connection_of_the_dispatcher_publishes_without_confirmation() -> None:
    """Celery's pool of producers publishes tasks: RabbitMQ must confirm them, also after an event."""
    app = Celery("events", broker="memory://", events="tasks.event_dispatcher:EventLoopEvents")
    own = app.connection_for_write()
    app.events.Dispatcher(own)
    assert own.connection.confirm_publish is False
    with app.events.default_dispatcher() as dispatcher:
        assert not hasattr(dispatcher.connection.connection, "confirm_publish")
    own.release()
    app.close()
