"""deploy/ and the operator's pages: valid to the tools that will read them, and true to the service."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import kubernetes_validate
import pytest
import yaml

from cloud.config import CloudConfig, read_cloud_config
from splitward.config import build_config, parse_toml

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
METRIC = re.compile(r"\bsplitward_[a-z_]+")
SUFFIXES = re.compile(r"_(total|bucket|sum|count)$")


def run(*command: str, **environment: str) -> str:
    """Output of a tool that has to be there."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed: apt install docker-compose prometheus")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def manifests() -> list[dict[str, Any]]:
    found = [one for path in MANIFESTS for one in yaml.safe_load_all(path.read_text())]
    return [one for one in found if one["kind"] != "Kustomization"]


def commands(page: str) -> list[str]:
    """Lines of a page's console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    return [line.strip() for block in blocks for line in block.split("\n")]


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_compose_file_is_valid_and_asks_for_its_passwords() -> None:
    file = str(DEPLOY / "compose.yaml")
    shown = yaml.safe_load(
        run("docker-compose", "-f", file, "config", POSTGRES_PASSWORD="one", GRAFANA_PASSWORD="two")
    )
    for name, service in shown["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
    failed = subprocess.run(["docker-compose", "-f", file, "config"], capture_output=True, check=False)
    assert failed.returncode != 0


def test_the_brokers_list_of_revoked_certificates_is_refreshed_where_it_reads_it() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    refresher, broker = services["revocations"], services["mosquitto"]
    assert refresher["entrypoint"] == ["python", "-m", "cloud.revocations"]
    url, folder, process = refresher["command"]
    assert (urlsplit(url).hostname, urlsplit(url).port) == ("cloud", 8443)
    assert f"crlfile {folder}/revoked.crl\n" in (DEPLOY / "mosquitto" / "mosquitto.conf").read_text()
    assert [f"./certificates/broker:{folder}"] == refresher["volumes"]
    assert f"./certificates/broker:{folder}:ro" in broker["volumes"]
    assert (refresher["user"], refresher["pid"], process) == (broker["user"], "service:mosquitto", "1")


def test_every_file_that_is_mounted_is_there_or_made_by_the_operator() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounted = [one.split(":")[0] for service in services.values() for one in service.get("volumes", [])]
    for path in (one for one in mounted if one.startswith("./")):
        made_by_hand = path.startswith(("./certificates/", "./models"))
        assert made_by_hand or (DEPLOY / path).exists(), path


def test_certificates_are_made_where_the_services_authority_lies_and_for_whom_they_serve() -> None:
    page = (ROOT / "docs" / "cloud.md").read_text()
    shell = commands(page)
    made = [line for line in shell if " certify " in line]
    outs = [line.rpartition(" ")[2] for line in made]
    assert outs == ["/certificates/broker", "/certificates/cloud"]
    for line, out in zip(made, outs, strict=True):
        folder = f"deploy/certificates/{Path(out).name}"
        assert line.startswith("docker compose run --rm --no-deps ")
        assert f' -v "$PWD/deploy/certificates:/certificates" cloud certify {Path(out).name} --host ' in line
        (given,) = [one for one in shell if one.startswith("sudo install -d") and folder in one]
        uid = re.search(r"useradd .*--uid (\d+)", (DEPLOY / "cloud" / "Dockerfile").read_text())
        assert uid is not None
        assert f"-o {uid[1]} -g {uid[1]} " in given
        assert shell.index(given) < shell.index(line)
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    taken_over = shell.index(f"sudo chown -R {services['mosquitto']['user']} deploy/certificates/broker")
    assert taken_over > shell.index(made[-1])
    state_dir = Path(read_cloud_config(DEPLOY / "cloud" / "cloud.toml").fleet.state_dir)
    assert f"fleet:{state_dir.parent}" in services["cloud"]["volumes"]


def test_prometheus_can_read_the_authority_when_it_starts_and_its_token_after() -> None:
    """Without `ca_file` at its start it makes no scrape pool, and never tries again; a token it reads each time."""
    before, up, after = (ROOT / "docs" / "cloud.md").read_text().partition("`docker compose up -d`")
    assert up
    (scraped,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    authority, token = scraped["tls_config"]["ca_file"], scraped["authorization"]["credentials_file"]
    prometheus = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["prometheus"]
    assert f"./certificates/prometheus:{Path(authority).parent}:ro" in prometheus["volumes"]
    assert Path(token).parent == Path(authority).parent
    nobodys = "-o 65534 -g 65534"  # the image's user, and no capability to read what is not its own
    folder = "deploy/certificates/prometheus"
    shell = commands(before)
    copied = shell.index(
        f"sudo install -m 400 {nobodys} deploy/certificates/cloud/{Path(authority).name} {folder}"
    )
    assert shell.index(f"sudo install -d -m 700 {nobodys} {folder}") < copied
    assert copied > max(index for index, line in enumerate(shell) if " cloud certify cloud " in line)
    made, restarted = commands(after)[:2]
    assert " token prometheus --scope read | " in made
    assert made.endswith(f"sudo install -m 400 {nobodys} /dev/stdin {folder}/{Path(token).name}")
    assert restarted == "docker compose restart prometheus"


@pytest.mark.parametrize("manifest", manifests(), ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_every_manifest_is_what_kubernetes_takes(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.37", strict=True)


def test_the_kustomization_names_every_manifest() -> None:
    kustomization = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    assert sorted([*kustomization["resources"], "kustomization.yaml"]) == [path.name for path in MANIFESTS]


def test_the_configurations_are_ones_that_the_service_takes() -> None:
    config = read_cloud_config(DEPLOY / "cloud" / "cloud.toml")
    (held,) = [one for one in manifests() if one["kind"] == "ConfigMap"]
    other = build_config(parse_toml(held["data"]["cloud.toml"]), CloudConfig, where="cloud.yaml")
    assert other.broker.tls == config.broker.tls
    assert other.store.url == config.store.url
    assert other.fleet.state_dir == config.fleet.state_dir


@pytest.mark.anyio
async def test_the_probes_are_answered_whatever_address_the_pod_has(run_cloud: Any) -> None:
    (held,) = [one for one in manifests() if one["kind"] == "ConfigMap"]
    config = build_config(parse_toml(held["data"]["cloud.toml"]), CloudConfig, where="cloud.yaml")
    (workers,) = [one for one in manifests() if one["kind"] == "StatefulSet"]
    (container,) = workers["spec"]["template"]["spec"]["containers"]
    async with run_cloud(api=config.api) as cloud:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(cloud.app), base_url="https://10.244.1.7:8443")
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[probe]["httpGet"]
            headers = {one["name"]: one["value"] for one in asked["httpHeaders"]}
            assert (await client.get(asked["path"], headers=headers)).status_code == 200, probe
        worker = f"{workers['metadata']['name']}-1.{workers['spec']['serviceName']}.splitward.svc.cluster.local"
        assert (await client.get("/metrics", headers={"Host": f"{worker}:8443"})).status_code == 401  # no token
        assert (await client.get("/healthz")).status_code == 400
        await client.aclose()


def test_promtool_takes_the_alerts_and_they_go_off_when_they_should() -> None:
    rules = DEPLOY / "prometheus"
    assert f"{len(alerts())} rules found" in run("promtool", "check", "rules", str(rules / "alerts.yml"))
    run("promtool", "test", "rules", str(rules / "alerts_test.yml"))
    tested = yaml.safe_load((rules / "alerts_test.yml").read_text())["tests"]
    raised = {one["alertname"] for test in tested for one in test["alert_rule_test"] if one["exp_alerts"]}
    assert raised == {one["alert"] for one in alerts()}


def test_every_alert_has_its_section_of_the_runbook() -> None:
    sections = set(re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE))
    assert sections == {one["alert"] for one in alerts()}
    for one in alerts():
        assert one["annotations"]["runbook"] == f"docs/runbook.md#{one['alert'].lower()}"


@pytest.mark.anyio
async def test_alerts_and_dashboard_ask_for_metrics_that_there_are(cloud: Any) -> None:
    cloud.parts.metrics.certificate_expires.labels("api").set(0)
    exposed = cloud.parts.metrics.expose().decode()
    there = {SUFFIXES.sub("", name) for name in METRIC.findall(exposed)}
    page = json.loads((DEPLOY / "grafana" / "dashboards" / "splitward.json").read_text())
    asked = [target["expr"] for panel in page["panels"] for target in panel["targets"]]
    asked += [one["expr"] for one in alerts()]
    wanted = {SUFFIXES.sub("", name) for query in asked for name in METRIC.findall(query)}
    assert wanted <= there, wanted - there
    assert len(page["panels"]) == len({panel["id"] for panel in page["panels"]})


@pytest.mark.anyio
@pytest.mark.parametrize("page", ["cloud.md", "runbook.md"])
async def test_the_operators_pages_name_routes_that_there_are(page: str, cloud: Any) -> None:
    text = (ROOT / "docs" / page).read_text()
    paths = cloud.app.openapi()["paths"]
    named = re.findall(r"`?(GET|POST|DELETE) (/v1/[^\s`]+)", text)
    assert named
    for method, path in named:
        assert method.lower() in paths.get(path.rstrip(",.;"), {}), f"{method} {path}"
