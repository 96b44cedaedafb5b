"""Celery: tasks, batch strategies, suspension, dispatch and the broker transport. `worker.flow` has the use cases."""
