"""A real Prometheus for tests: started on loopback with the configuration we ship, asked, stopped by its pid."""

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
OVERVIEW = ROOT / "dashboards/grafana/overview.json"
CONFIG = ROOT / "dashboards/prometheus/prometheus.yml"

PATIENCE_S = 120.0  # a loaded machine may take a while
ALL = ".*"  # what Grafana puts for a variable whose "All" is chosen


@dataclass(frozen=True, slots=True)
class DashboardQuery:
    """One query of one panel, its variables replaced: every camera, stage and edge."""

    panel: str
    expr: str

    @property
    def metric_names(self) -> set[str]:
        return set(re.findall(r"\bomni_[a-z0-9_]+", self.expr))


def dashboard_queries(path: Path, rate_interval: str = "10s") -> list[DashboardQuery]:
    """Every query of a Grafana dashboard, in the order of its panels. rate_interval: at least two scrapes long."""
    dashboard = json.loads(path.read_text())
    variables = {variable["name"]: ALL for variable in dashboard["templating"]["list"]}
    variables["__rate_interval"] = rate_interval
    return [
        DashboardQuery(panel["title"], re.sub(r"\$(\w+)", lambda match: variables[match[1]], target["expr"]))
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]


@dataclass(frozen=True, slots=True)
class Sample:
    labels: dict[str, str]
    value: float


class PrometheusServer:
    """A Prometheus that finds its targets at a gateway's `/sd/prometheus` and scrapes them each second."""

    def __init__(self, folder: Path, gateway_url: str) -> None:
        self._config = folder / "prometheus.yml"
        self._log = folder / "prometheus.log"
        self._data = folder / "data"
        self._url = f"http://127.0.0.1:{_free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        _write_config(self._config, gateway_url)

    def start(self) -> None:
        """Returns when it answers. Skips the test where Prometheus isn't installed."""
        binary = shutil.which("prometheus")
        if binary is None:
            pytest.skip("prometheus is not installed: apt-get install prometheus")
        address = self._url.removeprefix("http://")
        command = [binary, f"--config.file={self._config}", f"--storage.tsdb.path={self._data}"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE_S
        while not self._is_ready():
            assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=PATIENCE_S)

    def query(self, expr: str) -> list[Sample]:
        """The vector an expression gives now. Raises HTTPError for what isn't PromQL."""
        url = f"{self._url}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            result = json.load(answer)["data"]["result"]
        return [Sample(row["metric"], float(row["value"][1])) for row in result]

    def wait_for(self, expr: str, timeout_s: float = PATIENCE_S) -> list[Sample]:
        """The first result of an expression that holds a number; the last one when timeout_s is over."""
        deadline = time.monotonic() + timeout_s
        while not (samples := self.query(expr)) or all(math.isnan(sample.value) for sample in samples):
            if time.monotonic() > deadline:
                return samples
            time.sleep(0.25)
        return samples

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def running_prometheus(folder: Path, gateway_url: str) -> Iterator[PrometheusServer]:
    server = PrometheusServer(folder, gateway_url)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _write_config(path: Path, gateway_url: str) -> None:
    """The configuration we ship, for another gateway and with tests' patience: 1 s instead of 2 s and 5 s."""
    yaml = YAML(typ="safe")
    config = yaml.load(CONFIG)
    (job,) = config["scrape_configs"]
    (discovery,) = job["http_sd_configs"]
    config["global"].update(scrape_interval="1s", evaluation_interval="1s")
    job.update(scrape_interval="1s", scrape_timeout="1s")
    discovery.update(url=f"{gateway_url}/sd/prometheus", refresh_interval="1s")
    with path.open("w") as file:
        yaml.dump(config, file)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
