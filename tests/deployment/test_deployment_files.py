"""Deployment files agree with the code: roles, settings, metrics, runbooks."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.setting_types import ENV_PREFIX
from config.settings import Settings, load_rejecting_unknown
from dashboard.__main__ import MAX_DATABASE_CONNECTIONS
from demo.processes import ROOT, procfile
from tests.support.role_secrets import SECRETS, secrets_of

DEPLOY = ROOT / "deploy"
RUNBOOKS = ROOT / "docs" / "runbooks"
PRICE_LIST_SETTING = "PAYREADY_PRICE_LIST_FILE"
LONG_RUNNING = set(procfile()) - {"release"}


def _objects() -> Iterator[dict[str, Any]]:
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


def _alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return list(group["rules"])


def _expressions(path: Path) -> Iterator[str]:
    if path.suffix == ".json":
        for panel in json.loads(path.read_text())["panels"]:
            yield from (target["expr"] for target in panel.get("targets", ()))
    else:
        yield path.read_text()


@pytest.mark.parametrize(
    "name",
    ["grafana/payready.json", "prometheus/alerts.yml", "prometheus/alerts.test.yml", "kubernetes/scaling.yaml"],
)
def test_every_watched_metric_is_exported(name: str) -> None:
    """A panel or an alert on a metric that no role exports never shows anything."""
    sources = [*(ROOT / "worker").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]
    exported = {found for path in sources for found in re.findall(r'"(payready_[a-z_]+)"', path.read_text())}
    exported |= {"payready_database_up", "payready_broker_up", "payready_redis_up"}
    watched = {
        re.sub(r"_(total|bucket|count|sum)$", "", found)
        for expression in _expressions(DEPLOY / name)
        for found in re.findall(r"\bpayready_[a-z_]+", expression)
    }
    assert watched
    assert watched - {re.sub(r"_total$", "", found) for found in exported} == set()


def _runbook(alert: str) -> str:
    """Return the file name of an alert's runbook."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", alert.removeprefix("Payready")).lower() + ".md"


def test_every_alert_links_to_its_runbook_and_has_a_promtool_test() -> None:
    """No runbook is left without an alert, and the index lists each."""
    names = {alert["alert"]: _runbook(alert["alert"]) for alert in _alerts()}
    links = {alert["alert"]: alert["annotations"]["runbook_url"] for alert in _alerts()}
    assert all(links[alert].endswith(f"{{{{ end }}}}/runbooks/{name}") for alert, name in names.items())
    assert set(names.values()) == {path.name for path in RUNBOOKS.glob("*.md")} - {"README.md"}
    index = (RUNBOOKS / "README.md").read_text()
    assert set(re.findall(r"^\| \[(\w+)\]\(([\w-]+\.md)\)", index, re.MULTILINE)) == set(names.items())
    tested = set(re.findall(r"alertname: (\w+)", (DEPLOY / "prometheus" / "alerts.test.yml").read_text()))
    assert set(names) == tested


@pytest.mark.parametrize("path", sorted(RUNBOOKS.glob("[!R]*.md")), ids=lambda path: path.stem)
def test_runbook_has_the_four_headings_in_order(path: Path) -> None:
    """The title is the alert's name."""
    text = path.read_text()
    (title,) = re.findall(r"^# (\w+)$", text, re.MULTILINE)
    assert _runbook(title) == path.name
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Meaning", "Impact", "Diagnosis", "Fix"]


def test_guide_lists_the_secrets_of_each_role() -> None:
    """Its table says the same as `cli/setting_groups.py`."""
    guide = (ROOT / "docs" / "howto" / "deploy-procfile.md").read_text()
    cells = [re.findall(r"\| *(`[^`]+`|yes)? *(?=\|)", line) for line in guide.splitlines() if line.startswith("| `")]
    rows = {row[0].strip("`").split()[-1]: row[1:] for row in cells if len(row) == len(SECRETS) + 1 and "yes" in row}
    listed = {
        role: {name for name, cell in zip(SECRETS, row, strict=True) if cell == "yes"} for role, row in rows.items()
    }
    assert listed == {role: secrets_of(role) for role in [*procfile(), "doctor"]}


def test_compose_runs_every_role_confined() -> None:
    """A role has its name of the Procfile, a read-only file system, and ports on the loopback interface only."""
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    roles = {name: service for name, service in services.items() if service["image"] == "payready"}
    doctor = roles.pop("doctor")
    assert doctor["command"][:2] == ["payready", "doctor"]
    assert {name: service["command"] for name, service in roles.items()} == {name: [name] for name in procfile()}
    for name, service in {**roles, "doctor": doctor}.items():
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        assert [volume["target"] for volume in service["volumes"]] == [service["environment"][PRICE_LIST_SETTING]]
        given = {
            key: re.sub(r"\$\{[^}]*\}", "set-in-the-file-env", value) for key, value in service["environment"].items()
        }
        settings = {key: value for key, value in given.items() if key.startswith(ENV_PREFIX)}
        assert settings.keys() - {PRICE_LIST_SETTING} == secrets_of(name), name
        load_rejecting_unknown(settings)
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in ports)


def _pods() -> dict[str, dict[str, Any]]:
    """Return the specification of each role's pod, and of the doctor's."""
    pods = {}
    for item in _objects():
        spec = item["spec"]["jobTemplate"]["spec"] if item["kind"] == "CronJob" else item.get("spec", {})
        if item["kind"] in ("Deployment", "Job", "CronJob"):
            pods[item["metadata"]["name"]] = spec["template"]["spec"]
    return pods


def _kubernetes_settings() -> dict[str, str]:
    lines = (DEPLOY / "kubernetes" / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def _containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["containers"], *pod.get("initContainers", ())]


def test_kubernetes_runs_every_role_confined() -> None:
    """A pod has probes, an unprivileged user, and no environment variables of Kubernetes services."""
    pods = _pods()
    assert pods.keys() == {*procfile(), "doctor"}
    assert pods["doctor"]["containers"][0]["args"][:2] == ["payready", "doctor"]
    for role, pod in pods.items():
        assert role == "doctor" or pod["containers"][0]["args"] == [role]
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in _containers(pod):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"name": "price-list", "mountPath": "/prices"} in container["volumeMounts"]
        probes = {"startupProbe", "livenessProbe", "readinessProbe"} & pod["containers"][0].keys()
        assert len(probes) == (3 if role in LONG_RUNNING else 0)
    listed = set(yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["resources"])
    assert listed == {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    secrets = {
        "PAYREADY_DATABASE_URL": "postgresql://payready@postgres/payready",
        "PAYREADY_REDIS_URL": "redis://valkey:6379/0",
        "PAYREADY_QUILTT_API_KEY": "an-api-key-of-the-test",
        "PAYREADY_WEBHOOK_SECRETS": "a-secret-of-16-characters",
        "PAYREADY_DASHBOARD_USERS": "olivia:operator:-",
    }
    settings = load_rejecting_unknown({**_kubernetes_settings(), **secrets})
    assert str(settings.price_list_file.parent) == "/prices"


def test_keda_reads_the_queues_of_the_role() -> None:
    """Each list is a queue that the role consumes, with the instance of `settings.env`."""
    instance = _kubernetes_settings().get("PAYREADY_INSTANCE")
    prefix = f"{instance}." if instance else ""
    scaled = {item["metadata"]["name"]: item["spec"] for item in _objects() if item["kind"] == "ScaledObject"}
    for role in ("worker", "refresh"):
        lists = {each["metadata"]["listName"] for each in scaled[role]["triggers"] if each["type"] == "redis"}
        queues = set(procfile()[role].partition("--queues ")[2].split()[0].split(",")) - {"maintenance"}
        assert lists == {f"{prefix}{queue}" for queue in queues}


def test_kubernetes_gives_each_role_only_its_secrets() -> None:
    """The guide creates each secret, with the one setting that is in it."""
    guide = (ROOT / "docs" / "howto" / "deploy-kubernetes.md").read_text()
    contents = dict(re.findall(r"secret generic (payready-[\w-]+) --from-literal (\w+)=", guide))
    for role, pod in _pods().items():
        for container in _containers(pod):
            secrets = [source["secretRef"]["name"] for source in container["envFrom"] if "secretRef" in source]
            assert {contents[name] for name in secrets} == secrets_of(role), role


def _max_pods(role: str) -> int:
    """Return the highest number of a role's pods: during a rollout a quarter more than its replicas, rounded up."""
    maxima = {
        item["spec"]["scaleTargetRef"]["name"]: item["spec"]["maxReplicaCount"]
        for item in _objects()
        if item["kind"] == "ScaledObject"
    }
    replicas = int(maxima.get(role, 1))
    return replicas + -(-replicas // 4)


def test_maxima_of_scaling_fit_the_connections_that_the_guide_asks_for() -> None:
    """Every pod may use its whole pool. `release` and the doctor have one each, and PostgreSQL reserves three."""
    connections = int(_kubernetes_settings()["PAYREADY_DATABASE_CONNECTIONS"])
    needed = connections * sum(_max_pods(role) for role in ("web", "worker", "refresh", "beat"))
    needed += MAX_DATABASE_CONNECTIONS * _max_pods("dashboard") + 2 + 3
    guide = (ROOT / "docs" / "howto" / "deploy-kubernetes.md").read_text()
    [asked] = re.findall(r"`max_connections` to at least (\d+)", guide)
    assert needed <= int(asked) < needed + 10
    for name in ("scaling.yaml", "settings.env"):
        assert f"max_connections {asked}" in (DEPLOY / "kubernetes" / name).read_text()


def test_compose_fits_the_connections_of_its_postgresql() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    [limit] = [int(option.split("=")[1]) for option in services["postgres"]["command"] if "max_connections" in option]
    replicas = sum(services[role].get("deploy", {}).get("replicas", 1) for role in ("web", "worker", "refresh", "beat"))
    default = load_rejecting_unknown({}).database_connections
    assert default * replicas + MAX_DATABASE_CONNECTIONS + 2 + 3 <= limit


def test_web_may_drain_and_finish_before_it_is_killed() -> None:
    """Compose, Kubernetes and the documented systemd unit. `docs/howto/configure-the-proxy.md` states the 25 s."""
    least_s = Settings.model_fields["drain_s"].default + 25
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["web"]
    assert int(compose["stop_grace_period"].removesuffix("s")) >= least_s
    (pod,) = (
        item["spec"]["template"]["spec"]
        for item in _objects()
        if item["kind"] == "Deployment" and item["metadata"]["name"] == "web"
    )
    assert pod["terminationGracePeriodSeconds"] >= least_s
    assert "lifecycle" not in pod["containers"][0], "`web` drains itself"
    (unit,) = re.findall(r"TimeoutStopSec=(\d+)", (ROOT / "docs" / "howto" / "deploy-procfile.md").read_text())
    assert int(unit) >= least_s


def test_image_has_exactly_the_production_packages() -> None:
    """All packages but the simulator."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = set(re.findall(r"^COPY (\w+) /app/\w+$", dockerfile, re.MULTILINE))
    assert copied == {"cli", "config", "dashboard", "demo", "migrations", "tasks", "webhook", "worker"}
    assert re.search(r"^USER 10001:10001$", dockerfile, re.MULTILINE)
    ignored = (ROOT / ".dockerignore").read_text()
    assert all(f"!{name}\n" in ignored for name in copied)
