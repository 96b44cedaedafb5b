"""`python -m simulator`: start the simulator of Quiltt."""

import argparse
from pathlib import Path
from random import Random

from simulator.fake_provider import Provider
from simulator.http_server import Server
from simulator.provider_api import build_simulator_app_with_sender
from simulator.request_log import RequestLog
from simulator.scenarios import scenario_table
from simulator.webhook_sender import WebhookSender


def _argument_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("simulator", description=__doc__, formatter_class=formatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9900, help="0: any free port")
    parser.add_argument("--webhook-url", required=True, help="URL to which the events are sent")
    parser.add_argument("--webhook-secret", required=True, help="secret that signs the webhooks")
    parser.add_argument("--api-key", required=True, help="API key that the calls must carry")
    parser.add_argument("--mode", choices=["TEST", "SANDBOX", "PRODUCTION"], default="TEST")
    parser.add_argument("--seed", type=int, help="seed of the delays and of the scenario mix")
    parser.add_argument("--log", type=Path, help="also append the log to this file, as JSON lines")
    parser.add_argument("--list", action="version", version=scenario_table(), help="print the scenarios and exit")
    return parser


def main() -> None:
    """Serve until the process receives a signal."""
    options = _argument_parser().parse_args()
    log = RequestLog(options.log)
    webhook_sender = WebhookSender(options.webhook_url, options.webhook_secret, log)
    provider = Provider(
        api_key=options.api_key, mode=options.mode, rng=Random(options.seed), log=log, webhook_sender=webhook_sender
    )
    Server(build_simulator_app_with_sender(provider), options.host, options.port).run()


if __name__ == "__main__":
    main()
