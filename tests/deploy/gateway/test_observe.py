import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from deploy.gateway.exposition import MergedExposition, Target
from deploy.gateway.gateway_server import MAX_CONNECTIONS, GatewayError, GatewayServer
from deploy.gateway.observe import build_gateway
from graph.exporter import serve_metrics
from graph.metrics import Metrics

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]
SCRAPE_TIMEOUT_S = 0.3
NUM_HANGING = 10
PATIENCE_S = 60.0
get = partial(httpx.get, timeout=PATIENCE_S)


class FakePipeline:
    """The state of a pipeline which tests write down."""

    def __init__(self) -> None:
        self.processes: list[Target] = []
        self.reasons: list[str] = []
        self.lives = True

    def targets(self) -> Sequence[Target]:
        return self.processes

    def alive(self) -> bool:
        return self.lives

    def ready(self) -> tuple[bool, list[str]]:
        return not self.reasons, self.reasons

    def snapshot(self) -> Mapping[str, object]:
        return {"stages": [{"name": "llm", "ready": 1, "desired": 2}]}


@pytest.fixture
def pipeline() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def gateway(pipeline: FakePipeline) -> TestClient:
    return TestClient(build_gateway(pipeline, scrape_timeout_s=SCRAPE_TIMEOUT_S), base_url="http://127.0.0.1")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def llm_replica(stack: ExitStack, replica: int, num_units: int) -> Target:
    """A served registry of an LLM replica which has processed that many units."""
    registry = CollectorRegistry()
    Metrics(registry).stage("llm").processed(num_units, queue_s=0.01, compute_s=0.2, cpu_s=0.2)
    server = serve_metrics(registry)
    stack.callback(server.stop)
    return Target("127.0.0.1", server.port, stage="llm", replica=replica, process="llm")


def peer(stack: ExitStack, answer: Callable[[socket.socket], object], process: str = "tts") -> Target:
    """A process that answers its one connection by `answer`."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    stack.callback(thread.join, timeout=5)
    return Target("127.0.0.1", listener.getsockname()[1], stage="tts", replica=0, process=process)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def scraped(gateway: TestClient) -> Series:
    """The series of `/metrics`, each once; fails when the exposition isn't valid."""
    families = list(text_string_to_metric_families(gateway.get("/metrics").text))
    assert len({family.name for family in families}) == len(families), "a family occurs twice"
    samples = [sample for family in families for sample in family.samples]
    series = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}
    assert len(series) == len(samples), "a series occurs twice"
    return series


def failures(series: Series) -> dict[str, float]:
    name = "omni_scrape_failures_total"
    return {dict(labels)["target"]: value for (metric, labels), value in series.items() if metric == name}


def page(body: str) -> bytes:
    return f"HTTP/1.0 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def until_served(url: str) -> httpx.Response:
    """The first answer that isn't 503, the last one after a minute."""
    deadline = time.monotonic() + PATIENCE_S
    while (answer := get(url)).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.02)
    return answer


def test_two_replicas_appear_in_one_family_told_apart_by_replica(
    gateway: TestClient, pipeline: FakePipeline, stack: ExitStack
) -> None:
    pipeline.processes = [llm_replica(stack, 0, num_units=3), llm_replica(stack, 1, num_units=5)]
    units = {labels: value for (name, labels), value in scraped(gateway).items() if name == "omni_units_total"}
    assert units == {
        (("replica", "0"), ("stage", "llm"), ("stage_process", "llm")): 3,
        (("replica", "1"), ("stage", "llm"), ("stage_process", "llm")): 5,
    }


def test_a_pipeline_without_processes_has_a_valid_exposition(gateway: TestClient) -> None:
    assert scraped(gateway) == {}


def test_a_dead_process_is_skipped_and_counted(gateway: TestClient, pipeline: FakePipeline, stack: ExitStack) -> None:
    dead = Target("127.0.0.1", closed_port(), stage="tts", replica=0, process="tts")
    pipeline.processes = [llm_replica(stack, 0, num_units=1), dead]
    scraped(gateway)
    series = scraped(gateway)
    assert failures(series) == {"llm/0": 0, "tts/0": 2}
    assert ("omni_units_total", (("replica", "0"), ("stage", "llm"), ("stage_process", "llm"))) in series


def test_processes_that_hang_are_given_up_and_counted(
    gateway: TestClient, pipeline: FakePipeline, stack: ExitStack
) -> None:
    released = threading.Event()
    pipeline.processes = [peer(stack, lambda _: released.wait(), process=f"tts{n}") for n in range(NUM_HANGING)]
    counted = failures(scraped(gateway))
    released.set()
    assert counted == {f"tts{n}/0": 1 for n in range(NUM_HANGING)}


def test_processes_are_scraped_side_by_side_so_that_none_waits_for_one_that_hangs(
    pipeline: FakePipeline, stack: ExitStack
) -> None:
    """Each answers once all have been asked."""
    all_requested = threading.Barrier(NUM_HANGING)

    def answer(connection: socket.socket) -> None:
        all_requested.wait()
        connection.recv(1 << 16)
        connection.sendall(page(""))

    gateway = TestClient(build_gateway(pipeline, scrape_timeout_s=PATIENCE_S), base_url="http://127.0.0.1")
    pipeline.processes = [peer(stack, answer, process=f"tts{n}") for n in range(NUM_HANGING)]
    assert failures(scraped(gateway)) == {f"tts{n}/0": 0 for n in range(NUM_HANGING)}


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage",
        b"HTTP/1.0 500 Oops\r\nContent-Length: 0\r\n\r\n",
        page("# TYPE omni_units_total counter\nomni_units_total 12\n")[:-2],
        b"HTTP/1.0 200 OK\r\n\r\n# TYPE omni_units_total counter\nomni_units_total 1\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe",
        page('omni_units_total{stage="llm"} 1\n'),
        page('# TYPE omni_units_total counter\nomni_units_total{stage="l"lm"} 1\n'),
        page("# TYPE omni_units_total counter\nomni_units_total many\n"),
        page("# TYPE omni_units_total counter\nomni_other_total 1\n"),
        page("<html>not an exporter</html>"),
    ],
)
def test_what_is_no_complete_exposition_is_refused_as_a_whole(
    gateway: TestClient, pipeline: FakePipeline, stack: ExitStack, answer: bytes
) -> None:

    def reply(connection: socket.socket) -> None:
        connection.recv(1024)
        connection.sendall(answer)

    pipeline.processes = [peer(stack, reply)]
    series = scraped(gateway)
    assert failures(series) == {"tts/0": 1}
    assert {name for name, _ in series} == {"omni_scrape_failures_total"}


def test_the_newer_of_two_processes_with_one_name_is_scraped(
    gateway: TestClient, pipeline: FakePipeline, stack: ExitStack
) -> None:
    pipeline.processes = [llm_replica(stack, 0, num_units=3), llm_replica(stack, 0, num_units=5)]
    assert [value for (name, _), value in scraped(gateway).items() if name == "omni_units_total"] == [5]


def test_merging_keeps_escapes_special_values_and_unlabelled_series() -> None:
    merged = MergedExposition()
    text = '# HELP a Say "a" \\\\ b.\n# TYPE a gauge\na{x="q\\"u\\\\o\\nte,}",y=""} +Inf\na NaN\n'
    assert merged.add(text, {"stage_process": 'i"o'})
    (family,) = text_string_to_metric_families(merged.text())
    assert family.samples[0].labels == {"x": 'q"u\\o\nte,}', "y": "", "stage_process": 'i"o'}
    assert family.samples[1].labels == {"stage_process": 'i"o'}
    assert [str(sample.value) for sample in family.samples] == ["inf", "nan"]


def test_a_process_that_gives_a_family_another_type_is_refused() -> None:
    merged = MergedExposition()
    assert merged.add("# TYPE a counter\na 1\n", {"replica": "0"})
    assert not merged.add("# TYPE a gauge\na 1\n", {"replica": "1"})
    assert 'replica="1"' not in merged.text()


def test_prometheus_finds_every_process(gateway: TestClient, pipeline: FakePipeline) -> None:
    pipeline.processes = [
        Target("10.0.0.7", 9001, stage="llm", replica=1, process="llm"),
        Target("::1", 9002, stage="camera", replica=0, process="io"),
    ]
    answer = gateway.get("/sd/prometheus")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == [
        {
            "targets": ["10.0.0.7:9001"],
            "labels": {"replica": "1", "stage_process": "llm", "__meta_omni_stage": "llm"},
        },
        {
            "targets": ["[::1]:9002"],
            "labels": {"replica": "0", "stage_process": "io", "__meta_omni_stage": "camera"},
        },
    ]


def test_ready_is_503_with_the_reasons_until_there_are_none(gateway: TestClient, pipeline: FakePipeline) -> None:
    pipeline.reasons = ["llm: 0 of 1 replicas ready"]
    waiting = gateway.get("/readyz")
    pipeline.reasons = []
    ready = gateway.get("/readyz")
    assert (waiting.status_code, waiting.json()) == (503, {"ready": False, "reasons": ["llm: 0 of 1 replicas ready"]})
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "reasons": []})


def test_health_says_whether_a_restart_would_help(gateway: TestClient, pipeline: FakePipeline) -> None:
    assert gateway.get("/healthz").status_code == 200
    pipeline.lives = False
    assert gateway.get("/healthz").status_code == 503


def test_ps_shows_the_snapshot(gateway: TestClient) -> None:
    assert gateway.get("/api/v1/ps").json() == {"stages": [{"name": "llm", "ready": 1, "desired": 2}]}


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/sd/prometheus", "/api/v1/ps"])
def test_nothing_can_be_changed_here(gateway: TestClient, path: str) -> None:
    assert gateway.post(path).status_code == 405
    assert gateway.delete(path).status_code == 405


@pytest.mark.parametrize("body", [b"x" * 10, iter([b"chunked", b"body"])])
def test_a_request_with_a_body_is_refused(gateway: TestClient, body: bytes | Iterator[bytes]) -> None:
    assert gateway.request("GET", "/metrics", content=body).status_code == 413


def test_the_server_takes_a_free_port_and_frees_it(pipeline: FakePipeline) -> None:
    server = GatewayServer(build_gateway(pipeline), port=0)
    server.start()
    answer = get(f"{server.url}/readyz")
    server.stop()
    assert answer.status_code == 200
    assert server.host == "127.0.0.1"
    with pytest.raises(httpx.ConnectError):
        get(server.url)


def test_a_busy_port_says_which_setting_to_change(pipeline: FakePipeline) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(GatewayError) as error:
            GatewayServer(build_gateway(pipeline), port=port).start()
    assert str(error.value) == f"port {port} on 127.0.0.1 is busy; set console.listen to another address"


def test_an_address_of_another_machine_says_which_setting_to_change(pipeline: FakePipeline) -> None:
    with pytest.raises(GatewayError, match=r"port 8600 on 203\.0\.113\.1 can't be had .*console\.listen"):
        GatewayServer(build_gateway(pipeline), host="203.0.113.1").start()


# ---- The edge of the house ------------------------------------------------------------------------------------------


@pytest.fixture
def server(pipeline: FakePipeline) -> Iterator[GatewayServer]:
    server = GatewayServer(build_gateway(pipeline), port=0)
    server.start()
    yield server
    server.stop()


def crowd(stack: ExitStack, server: GatewayServer, size: int, said: bytes) -> None:
    for _ in range(size):
        connection = stack.enter_context(socket.create_connection((server.host, server.port)))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(said)


@pytest.mark.parametrize(
    "said",
    [
        b"",  # idle
        b"GET /healthz HTTP/1.1\r\nHost: ",  # slow
        b"GET /api/v1/ps HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 20,  # never reads
        b"POST /api/v1/cameras HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n",  # has no end
        b"\x16\x03\x01\x00\xff",  # speaks TLS
    ],
)
def test_no_crowd_keeps_a_probe_out(server: GatewayServer, stack: ExitStack, said: bytes) -> None:
    crowd(stack, server, 64, said)
    assert get(f"{server.url}/healthz").status_code == 200
    crowd(stack, server, 2 * MAX_CONNECTIONS, said)
    assert [get(f"{server.url}{path}").status_code for path in ("/healthz", "/readyz", "/metrics")] == [200] * 3


def test_many_that_scrape_at_once_get_one_page(server: GatewayServer) -> None:
    with ThreadPoolExecutor(100) as pool, httpx.Client(limits=httpx.Limits(max_connections=100), timeout=60) as client:
        answers = list(pool.map(lambda _: client.get(f"{server.url}/metrics").status_code, range(100)))
    assert answers == [200] * 100


PATHS = ["/healthz", "/readyz", "/metrics", "/sd/prometheus", "/api/v1/ps", "/api/v1/cameras", "/nowhere"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "10.9.8.7", "localhost.evil.example", "", "127.0.0.1@e"]
)
def test_a_request_for_a_foreign_host_is_refused(gateway: TestClient, path: str, host: str) -> None:
    answer = gateway.get(path, headers={"Host": host})
    assert answer.status_code == 421
    assert "localhost" in answer.json()["error"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8600", "LOCALHOST.", "[::1]:8600", "127.0.0.1:9000"])
def test_this_machine_is_asked_by_its_names(gateway: TestClient, host: str) -> None:
    assert gateway.get("/healthz", headers={"Host": host}).status_code == 200


def test_http_1_0_needs_no_host(server: GatewayServer) -> None:
    with socket.create_connection((server.host, server.port)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert connection.makefile("rb").readline() == b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:3000", "https://127.0.0.1.evil.example", "http://[::1"]
)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_page_of_another_origin_changes_nothing(gateway: TestClient, method: str, origin: str) -> None:
    assert gateway.request(method, "/api/v1/cameras/door", headers={"Origin": origin}).status_code == 403
