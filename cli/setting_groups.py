"""The topic of each setting, and the roles that read it, for `docs/reference/configuration.md`.

A test compares the names with the settings.
"""

from collections.abc import Mapping

ALL = "all"
WORKERS = "`worker`, `refresh`"
RESOLVING = "`web`, `worker`, `refresh`, `dashboard`"
ALL_BUT_FLOWER = "`web`, `worker`, `refresh`, `beat`, `dashboard`"
DASHBOARD = "`dashboard`"

SETTING_GROUPS: Mapping[str, Mapping[str, str]] = {
    "Deployment": {"env": ALL, "instance": ALL},
    "Stores and broker": {
        "redis_url": ALL,
        "broker_url": ALL,
        "broker_priority_steps": ALL,
        "broker_priority_separator": ALL,
        "broker_key_prefix": ALL,
        "result_backend_url": ALL,
        "result_key_prefix": ALL,
        "database_url": ALL_BUT_FLOWER,
        "database_connections": ALL_BUT_FLOWER,
        "database_pooler": ALL_BUT_FLOWER,
    },
    "Quiltt": {
        "quiltt_api_url": WORKERS,
        "quiltt_auth_url": "`refresh`",
        "quiltt_api_key": WORKERS,
        "quiltt_proxy_url": WORKERS,
        "quiltt_ca_file": WORKERS,
        "allow_production_key": "`refresh`",
        "quiltt_connect_timeout_s": WORKERS,
        "quiltt_read_timeout_s": WORKERS,
        "quiltt_max_connections": "`refresh`",
    },
    "Refreshes and balances": {
        "currency": "`worker`",
        "clock_skew_s": RESOLVING,
        "refresh_balance_time": RESOLVING,
        "funds_hold_s": RESOLVING,
        "refresh_window_s": RESOLVING,
        "uncertain_grace_s": WORKERS,
    },
    "Flow control": {
        "calls_per_s": WORKERS,
        "min_time_left_for_call_s": "`worker`",
        "circuit_breaker_failures": "`refresh`",
    },
    "Balance polls": {
        "balance_polls_per_s": "`worker`",
        "balance_poll_lead_s": "`worker`",
        "allow_sync_balances": "`refresh`",
    },
    "Webhook": {
        "webhook_secrets": "`web`",
        "webhook_tolerance_s": "`web`",
        "webhook_url": "`worker`",
        "webhook_host": "`web`",
        "webhook_port": "`web`",
        "drain_s": "`web`",
    },
    "Fees": {
        "price_list_file": ALL_BUT_FLOWER,
        "fee_cap_per_day": "`refresh`, `beat`, `dashboard`",
        "fee_cap_per_month": "`refresh`, `beat`, `dashboard`",
        "call_cap_per_account_per_day": "`refresh`",
    },
    "Celery": {
        "visibility_timeout_s": WORKERS,
        "callback_queue": ALL_BUT_FLOWER,
        "result_expires_s": RESOLVING,
    },
    "Dashboard": {
        "dashboard_host": DASHBOARD,
        "dashboard_port": DASHBOARD,
        "dashboard_users": DASHBOARD,
        "dashboard_users_file": DASHBOARD,
        "dashboard_proxy_user_header": DASHBOARD,
        "dashboard_proxy_addresses": DASHBOARD,
        "dashboard_flower_url": DASHBOARD,
    },
    "Observability": {
        "metrics_port": ALL_BUT_FLOWER,
        "metrics_host": ALL_BUT_FLOWER,
        "tracing_enabled": "`web`, `worker`, `refresh`, `beat`",
        "log_level": ALL,
    },
}
"""Roles to restart after a change of a setting, by topic and name of the setting."""
