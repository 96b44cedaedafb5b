"""What we decide and do about it. Plain Python: there is no Celery and no HTTP server in it."""
