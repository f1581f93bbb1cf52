"""Every query of the dashboard is put to a real Prometheus that scrapes real processes."""

import json
import math
import multiprocessing
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection

import pytest
from prometheus_client import CollectorRegistry

from deploy.gateway.exposition import Target
from deploy.gateway.gateway_server import GatewayServer
from deploy.gateway.observe import build_gateway
from graph.exporter import serve_metrics
from graph.metrics import TABLE, Metrics
from tests.support.prometheus import (
    CONFIG,
    OVERVIEW,
    DashboardQuery,
    PrometheusServer,
    dashboard_queries,
    running_prometheus,
)

QUERIES = dashboard_queries(OVERVIEW)
EDGE = "vision_encoder.image -> llm.image"
STAGES = ("vision_encoder", "llm", "tts", "vocoder")


def run_vision(connection: Connection) -> None:
    """A process with the camera and the sending end of an edge."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    camera, edge, bus = metrics.camera("door", ["timeout"]), metrics.edge(EDGE), metrics.bus(["magic"])
    stage = metrics.stage("vision_encoder")
    server = serve_metrics(registry)
    connection.send(server.port)
    camera.up(True)
    while not connection.poll(0.1):
        camera.frame(time.time())
        camera.gaps(1)
        camera.delivers(("video",))
        camera.bad("audio", 2)
        stage.processed(num_units=2, queue_s=0.004, compute_s=0.06, cpu_s=0.05)
        edge.accepted(2)
        edge.sent(65_536)
        edge.waited(0.002)
        edge.dropped("late")
        edge.in_flight(1)
        bus.invalid("magic")
    server.stop()


def run_llm(connection: Connection) -> None:
    """A process with the LLM, the receiving end of the edge, the sink and the coordinator."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    edge, stage, tokens = metrics.edge(EDGE), metrics.stage("llm"), metrics.tokens(["text", "codes"])
    windows, playback = metrics.windows("door", ["camera/door", "mic"], STAGES), metrics.playback("door")
    turns, coordinator = metrics.turns("door"), metrics.coordinator(STAGES, ["crash"])
    server = serve_metrics(registry)
    connection.send(server.port)
    metrics.build_info("0.1.0", "nano", trained=True)
    metrics.llm().kv_cache_usage(0.25)
    coordinator.sessions("open", 1)
    coordinator.replicas("llm", "ready", 1)
    turns.parked(False)
    while not connection.poll(0.1):
        edge.queue(depth=1, capacity=8)
        edge.delivered(age_s=0.15)
        edge.received(65_536)
        stage.processed(num_units=1, queue_s=0.01, compute_s=0.2, cpu_s=0.2)
        stage.carried(1)
        tokens.add("text", 4)
        windows.finished(latency_s=0.45)
        windows.finished(latency_s=1.2, late_stage="llm")
        windows.missing("mic")
        playback.lead(0.8)
        playback.heard(0.1)
        playback.underrun(silence_s=0.02)
        playback.interrupted()
        turns.text_budget(7)
        turns.decided("speak")
        coordinator.restarted("tts", "crash")
    server.stop()


class TwoProcesses:
    """The gateway's view of `run_vision` and `run_llm`."""

    def __init__(self, vision_port: int, llm_port: int) -> None:
        self._targets = [
            Target("127.0.0.1", vision_port, stage="vision_encoder", replica=0, process="io"),
            Target("127.0.0.1", llm_port, stage="llm", replica=0, process="llm"),
        ]

    def targets(self) -> Sequence[Target]:
        return self._targets

    def alive(self) -> bool:
        return True

    def ready(self) -> tuple[bool, list[str]]:
        return True, []

    def snapshot(self) -> Mapping[str, object]:
        return {}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    processes = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        ports = []
        for run in (run_vision, run_llm):
            ours, theirs = processes.Pipe()
            process = processes.Process(target=run, args=(theirs,), daemon=True)
            process.start()
            stack.callback(process.join, timeout=10)
            stack.callback(ours.send, "stop")
            ports.append(ours.recv())
        gateway = GatewayServer(build_gateway(TwoProcesses(*ports)), port=0)
        gateway.start()
        stack.callback(gateway.stop)
        server = stack.enter_context(running_prometheus(tmp_path_factory.mktemp("prometheus"), gateway.url))
        server.wait_for('count(count_over_time(up{job="omni"}[1m]) >= 3) == 2')
        yield server


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.panel)
def test_every_query_of_the_dashboard_shows_a_number(prometheus: PrometheusServer, query: DashboardQuery) -> None:
    samples = prometheus.wait_for(query.expr, timeout_s=10)
    assert samples, query.expr
    assert not all(math.isnan(sample.value) for sample in samples), f"only NaN: {query.expr}"


def test_a_process_is_named_by_what_it_is_and_not_by_its_port(prometheus: PrometheusServer) -> None:
    assert {sample.labels["instance"] for sample in prometheus.query("up")} == {"io/0", "llm/0"}


def test_no_label_of_ours_is_renamed_by_prometheus(prometheus: PrometheusServer) -> None:
    labels = {label for sample in prometheus.query('{__name__=~"omni_.*"}') for label in sample.labels}
    assert not {label for label in labels if label.startswith("exported_")}


def test_the_shipped_configuration_satisfies_promtool() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    check = subprocess.run([promtool, "check", "config", CONFIG], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


def test_the_dashboard_shows_every_declared_metric_and_no_other() -> None:
    # Prometheus sees an unreachable process as up == 0; the gateway counts it for those who have no Prometheus.
    declared = {metric.name for metric in TABLE} - {"omni_scrape_failures_total"}
    suffixed = r"(_bucket|_sum|_count)$"
    shown = {name for query in QUERIES for name in query.metric_names}
    of_table = {name if name in declared else re.sub(suffixed, "", name) for name in shown}
    assert {name for name in of_table if not name.startswith("omni_process_")} == declared


def test_every_panel_names_its_metrics_in_its_description() -> None:
    for panel in json.loads(OVERVIEW.read_text())["panels"]:
        for target in panel.get("targets", []):
            names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"omni_\w+", target["expr"])}
            assert names <= set(re.findall(r"\w+", panel["description"])), panel["title"]


def test_the_dashboard_has_no_data_source_of_ours_and_a_stable_name() -> None:
    dashboard = json.loads(OVERVIEW.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert dashboard["uid"] == "omni-overview"
    assert {panel["datasource"]["uid"] for panel in panels} == {"$datasource"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_variables_take_their_values_from_declared_metrics() -> None:
    labels_of = {metric.name: metric.labels for metric in TABLE}
    variables = json.loads(OVERVIEW.read_text())["templating"]["list"]
    for definition in (variable["definition"] for variable in variables if variable["type"] == "query"):
        name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", definition).groups()  # type: ignore[union-attr]
        assert label in labels_of[name], definition
