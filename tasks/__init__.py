"""Celery: tasks, the consumer of the queues, suspension and dispatch. `worker.flow` has the use cases."""
