"""Faults of the chaos test: how each of them is injected, and how it ends."""

import os
import signal
import threading
import time
from typing import Any

from redis import RedisError

from demo.processes import procfile
from tests.chaos.chaos_plan import REPLICAS, Fault
from tests.chaos.chaos_system import WAIT_TIMEOUT_S, ChaosSystem

FLUSH_WHEN_REPLACEABLE = """
for _, pattern in ipairs({'payments*', 'svc*', 'unacked'}) do
  if #redis.call('KEYS', pattern) > 0 then return 0 end
end
for _, message in ipairs(redis.call('HVALS', 'payready-unacked:payments')) do
  if string.find(message, 'payments.initiate', 1, true) then return 0 end
end
redis.call('FLUSHALL')
return 1
"""
"""Empty Redis when it contains no unaccepted job and no callback that the payments service has not run.

Only the broker stores these. payready must recover all other data of Redis by itself."""


class FaultInjector:
    """Injector of faults. Faults run in threads; a lock per target serialises them."""

    def __init__(self, system: ChaosSystem) -> None:
        self._system, self._servers = system, system.servers
        self._targets = {
            name: threading.Lock()
            for name in (*REPLICAS, "valkey", "sentinel", "postgres", "pooler", "rabbitmq", "beat2", "provider")
        }

    def inject(self, fault: Fault) -> None:
        """Inject a fault and wait until it has ended."""
        inject = {
            "kill": self._kill,
            "restart": self._restart,
            "pause": self._pause,
            "valkey restarts": self._valkey_restarts,
            "valkey killed": self._valkey_restarts,
            "redis failover": self._redis_fails_over,
            "sentinel killed": self._sentinel_killed,
            "rabbitmq killed": self._rabbitmq_killed,
            "postgres crashes": self._postgres_crashes,
            "postgres failover": self._postgres_fails_over,
            "standby killed": self._standby_killed,
            "pooler killed": self._pooler_killed,
            "redis emptied": self._empty_redis,
            "provider refuses": self._provider_rejects,
            "webhooks paused": self._pause_webhooks,
            "webhooks replayed": self._replay_webhooks,
            "connections break": self._break_connections,
            "two beats": self._two_beats,
            "all killed": self._kill_all,
        }[fault.kind]
        inject(fault)

    def _kill(self, fault: Fault) -> None:
        with self._targets[fault.target]:
            self._system.processes.stop_running_process(fault.target, signal.SIGKILL)
            time.sleep(fault.seconds)
            self._system.start(fault.target, fault.skew_s)

    def _restart(self, fault: Fault) -> None:
        with self._targets[fault.target]:
            self._system.processes.stop_running_process(fault.target, signal.SIGTERM)
            time.sleep(fault.seconds)
            self._system.start(fault.target, fault.skew_s)

    def _pause(self, fault: Fault) -> None:
        with self._targets[fault.target]:
            pid = self._pid(fault.target)
            # The process and not its group: PostgreSQL's processes share the group, the other targets have one process.
            os.kill(pid, signal.SIGSTOP)
            try:
                time.sleep(fault.seconds)
            finally:
                os.kill(pid, signal.SIGCONT)
            if fault.target == "valkey":
                self._servers.wait_for_replicas()

    def _pid(self, target: str) -> int:
        if target == "postgres":
            return self._servers.postgres.pid
        return self._servers.redis.pid if target == "valkey" else self._system.running[target].pid

    def _valkey_restarts(self, fault: Fault) -> None:
        with self._targets["valkey"]:
            server = self._servers.redis
            if fault.kind == "valkey killed":
                server.kill()
            else:
                server.stop()
            time.sleep(fault.seconds)
            server.start()
            self._servers.wait_for_replicas()

    def _redis_fails_over(self, fault: Fault) -> None:
        """Kill the master until the Sentinels have replaced it. It returns as a replica."""
        with self._targets["valkey"]:
            killed = self._servers.sentinels.kill_master()
            time.sleep(fault.seconds)
            killed.start()
            self._servers.wait_for_replicas()

    def _sentinel_killed(self, fault: Fault) -> None:
        """Kill the last Sentinel: two others remain, which is the quorum."""
        with self._targets["sentinel"]:
            sentinel = self._servers.sentinels.sentinels[-1]
            sentinel.kill()
            time.sleep(fault.seconds)
            sentinel.start()

    def _rabbitmq_killed(self, fault: Fault) -> None:
        if self._servers.rabbitmq is None:
            raise TypeError("the broker is not RabbitMQ")
        with self._targets["rabbitmq"]:
            self._servers.rabbitmq.kill()
            time.sleep(fault.seconds)
            self._servers.rabbitmq.start()

    def _postgres_crashes(self, fault: Fault) -> None:
        with self._targets["postgres"]:
            server = self._servers.postgres
            server.stop()
            time.sleep(fault.seconds)
            server.start()
            self._servers.wait_for_standby()

    def _postgres_fails_over(self, fault: Fault) -> None:
        """Kill the primary and promote its standby. The killed server becomes the standby of the promoted one."""
        pair = self._servers.postgres_pair
        with self._targets["postgres"]:
            pair.primary.kill()
            time.sleep(fault.seconds)
            pair.standby.promote()
            pair.rejoin()

    def _standby_killed(self, fault: Fault) -> None:
        """Kill the standby. Until it returns, PostgreSQL acknowledges no commit."""
        pair = self._servers.postgres_pair
        with self._targets["postgres"]:
            pair.standby.kill()
            time.sleep(fault.seconds)
            pair.standby.start()
            pair.wait_until_synchronous()

    def _pooler_killed(self, fault: Fault) -> None:
        if self._servers.pooler is None:
            raise TypeError("PostgreSQL has no pooler")
        with self._targets["pooler"]:
            self._servers.pooler.kill()
            time.sleep(fault.seconds)
            self._servers.pooler.start()

    def _empty_redis(self, _: Fault) -> None:
        """Empty Redis at a time when it contains no message that only the payments service could send again."""
        deadline = time.monotonic() + WAIT_TIMEOUT_S
        with self._system.sending:
            while time.monotonic() < deadline:
                self._system.check_all_running()  # the sending thread waits for this lock and does not check
                try:
                    with self._servers.redis.client() as client:
                        if self._servers.rabbitmq:  # the queues are elsewhere
                            client.flushall()
                            return
                        if client.eval(FLUSH_WHEN_REPLACEABLE, 0):
                            return
                except RedisError:
                    pass
                time.sleep(0.05)
        raise TimeoutError(f"the queues were not empty within {WAIT_TIMEOUT_S:.0f} s")

    def _provider_rejects(self, fault: Fault) -> None:
        with self._targets["provider"]:
            self._system.simulator.post("refuse", seconds=fault.seconds)
            time.sleep(fault.seconds + 0.2)

    def _pause_webhooks(self, fault: Fault) -> None:
        with self._targets["provider"]:
            self._system.simulator.post("pause")
            time.sleep(fault.seconds)
            self._system.simulator.post("resume")

    def _replay_webhooks(self, _: Fault) -> None:
        """Replay the 20 newest events with valid signatures, newest first, three times each."""
        rows = self._system.rows_if_available("SELECT * FROM balance ORDER BY received_at DESC LIMIT 20")
        with self._targets["provider"]:
            for row in rows:
                record = {"id": row["balance_id"], "accountId": row["account_id"], "source": "REFRESH"}
                record |= {"at": row["at"].isoformat()}
                record |= {name: _number(row[name]) for name in ("available", "current", "limit")}
                event = {"id": row["event_id"], "type": "balance.created", "record": record}
                body = {"eventTypes": ["balance.created"], "events": [event]}
                self._system.simulator.post("deliver", body=body, copies=3)

    def _break_connections(self, _: Fault) -> None:
        """Deliver disconnect events for connections of waiting payments."""
        query = "SELECT DISTINCT connection_id FROM payment WHERE state = 'waiting' ORDER BY connection_id LIMIT 3"
        rows = self._system.rows_if_available(query)
        with self._targets["provider"]:
            for row in rows:
                kind = "connection.disconnected"
                event = {"id": f"evt_{row['connection_id']}", "type": kind, "record": {"id": row["connection_id"]}}
                self._system.simulator.post("deliver", body={"eventTypes": [kind], "events": [event]}, copies=2)

    def _two_beats(self, fault: Fault) -> None:
        with self._targets["beat2"]:
            self._system.processes.start("beat2", procfile()["beat"])
            time.sleep(fault.seconds)
            self._system.processes.stop_running_process("beat2", signal.SIGKILL)

    def _kill_all(self, fault: Fault) -> None:
        for replica in REPLICAS:
            self._targets[replica].acquire()
        try:
            for replica in REPLICAS:
                self._system.processes.stop_running_process(replica, signal.SIGKILL)
            time.sleep(fault.seconds)
            for replica in REPLICAS:
                self._system.start(replica, fault.skew_s)
        finally:
            for replica in REPLICAS:
                self._targets[replica].release()


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
