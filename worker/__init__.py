"""What payready decides and does. Plain Python, without Celery."""
