"""What differs between deployments: settings, Celery configuration, logging, price list."""
