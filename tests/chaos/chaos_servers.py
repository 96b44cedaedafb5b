"""Servers of a chaos test: PostgreSQL, Redis and, if wanted, a pooler or RabbitMQ, as the topology says."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.chaos_plan import Topology
from tests.support.rabbit import RabbitMQ, rabbitmq
from tests.support.servers import Postgres, postgres
from tests.topologies.pgbouncer import PgBouncer, pgbouncer
from tests.topologies.postgres_standby import PostgresPair, postgres_pair
from tests.topologies.redis_servers import RedisServerProcess, SentinelServers, sentinel_servers

REDIS_OPTIONS = ("--appendonly", "yes", "--appendfsync", "no")
"""A killed server has written every acknowledged command. With `everysec` it would not write during a sync."""
REDIS_PASSWORD = "password"
REDIS_REPLICAS = 2
POOLER_OPTIONS = {"server_login_retry": 1}
"""By default PgBouncer refuses all clients for 15 s after PostgreSQL was unavailable once."""


@dataclass(frozen=True, kw_only=True)
class ChaosServers:
    """Running servers."""

    database_url: str
    """Address for the roles."""
    postgres_or_pair: Postgres | PostgresPair
    redis_or_sentinels: RedisServerProcess | SentinelServers
    rabbitmq: RabbitMQ | None
    pooler: PgBouncer | None

    @property
    def environ(self) -> dict[str, str]:
        """Settings of the roles."""
        sentinels = self.redis_or_sentinels
        url = sentinels.url if isinstance(sentinels, SentinelServers) else f"redis://127.0.0.1:{sentinels.port}/0"
        return {
            "PAYREADY_DATABASE_URL": self.database_url,
            "PAYREADY_DATABASE_POOLER": "transaction" if self.pooler else "none",
            "PAYREADY_REDIS_URL": url,
            **({"PAYREADY_BROKER_URL": self.rabbitmq.url} if self.rabbitmq else {}),
        }

    @property
    def postgres(self) -> Postgres:
        """The server that accepts writes."""
        servers = self.postgres_or_pair
        return servers.primary if isinstance(servers, PostgresPair) else servers

    @property
    def redis(self) -> RedisServerProcess:
        """The server that accepts writes."""
        servers = self.redis_or_sentinels
        return servers.master() if isinstance(servers, SentinelServers) else servers

    @property
    def postgres_pair(self) -> PostgresPair:
        """The primary and its standby.

        Raises:
            TypeError: there is no standby.
        """
        if not isinstance(self.postgres_or_pair, PostgresPair):
            raise TypeError("PostgreSQL has no standby")
        return self.postgres_or_pair

    @property
    def sentinels(self) -> SentinelServers:
        """The Sentinels and their servers.

        Raises:
            TypeError: there are none.
        """
        if not isinstance(self.redis_or_sentinels, SentinelServers):
            raise TypeError("Redis has no Sentinels")
        return self.redis_or_sentinels

    def wait_for_standby(self) -> None:
        """Wait until the standby of PostgreSQL, if there is one, acknowledges commits again."""
        if isinstance(self.postgres_or_pair, PostgresPair):
            self.postgres_or_pair.wait_until_synchronous()

    def wait_for_replicas(self) -> None:
        """Wait until the replicas of Redis, if there are some, are in step again."""
        if isinstance(self.redis_or_sentinels, SentinelServers):
            self.redis_or_sentinels.wait_for_replicas(REDIS_REPLICAS)


@contextmanager
def chaos_servers(folder: Path, topology: Topology) -> Iterator[ChaosServers]:
    """Run the servers for the duration of the block."""
    with ExitStack() as stack:
        broker = stack.enter_context(rabbitmq(folder / "rabbitmq")) if topology.rabbitmq else None
        redis: RedisServerProcess | SentinelServers
        if topology.sentinel:
            passwords = (REDIS_PASSWORD, REDIS_PASSWORD)
            redis = stack.enter_context(sentinel_servers(folder / "redis", *passwords, *REDIS_OPTIONS))
        else:
            redis = stack.enter_context(RedisServerProcess(folder / "redis", *REDIS_OPTIONS))
        database: Postgres | PostgresPair
        if topology.postgres_failover:
            database = stack.enter_context(postgres_pair())
            database.replicate_synchronously()
            database_url = database.url
        else:
            database = stack.enter_context(postgres())
            database_url = database.database()
        pooler = stack.enter_context(pgbouncer(database_url, **POOLER_OPTIONS)) if topology.pooler else None
        yield ChaosServers(
            database_url=pooler.url if pooler else database_url,
            postgres_or_pair=database,
            redis_or_sentinels=redis,
            rabbitmq=broker,
            pooler=pooler,
        )
