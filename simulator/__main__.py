"""`python -m simulator`: start the stand-in for Quiltt."""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

from simulator.fake_provider import Provider
from simulator.http_server import Server
from simulator.provider_api import build_app
from simulator.request_log import RequestLog
from simulator.scenarios import scenario_table
from simulator.webhook_sender import WebhookSender


def _argument_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("simulator", description=__doc__, formatter_class=raw)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9900, help="0: any free one")
    parser.add_argument("--webhook-url", required=True, help="where the events are sent")
    parser.add_argument("--webhook-secret", required=True, help="what they are signed with")
    parser.add_argument("--api-key", required=True, help="what the calls must carry")
    parser.add_argument("--mode", choices=["TEST", "SANDBOX", "PRODUCTION"], default="TEST")
    parser.add_argument("--seed", type=int, help="for the delays and for the scenario mix")
    parser.add_argument("--log", type=Path, help="also append the log to this file, as JSON lines")
    parser.add_argument("--list", action="version", version=scenario_table(), help="print the scenarios and exit")
    return parser


def main() -> None:
    """Serve until a signal comes."""
    options = _argument_parser().parse_args()
    log = RequestLog(options.log)
    courier = WebhookSender(options.webhook_url, options.webhook_secret, log)
    provider = Provider(options.api_key, options.mode, Random(options.seed), log, courier)
    Server(build_app(provider), options.host, options.port).run()


if __name__ == "__main__":
    main()
