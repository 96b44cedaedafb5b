"""What the payments service asks, as Celery tasks. They translate and enqueue; `worker.flow` decides."""
