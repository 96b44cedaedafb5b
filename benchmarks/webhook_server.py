"""Webhook server on one core, with an empty reference handler: `python -m benchmarks.webhook_server PORT`."""

import sys
from typing import Any

import uvicorn

from config.log_config import configure_logging
from config.settings import settings
from webhook.__main__ import SERVER
from webhook.endpoint import app

EMPTY_RESPONSE = "/empty"


async def reference_app(scope: Any, receive: Any, send: Any) -> None:
    """Handle `/empty` by reading the body and returning 204. Pass other paths to payready."""
    if scope["path"] != EMPTY_RESPONSE:
        await app(scope, receive, send)
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    configure_logging(settings())
    uvicorn.run(reference_app, host="127.0.0.1", port=int(sys.argv[1]), **SERVER)
